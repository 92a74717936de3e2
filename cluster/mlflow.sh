#!/usr/bin/env bash
# The MLflow server of a cluster, on its head:
#   mlflow.sh install STORAGE          as a service that starts again when it dies and after a reboot
#   mlflow.sh serve STORAGE ADDRESS    what that service runs
# It listens on one private address, where the security group lets nobody in but the cluster's own nodes, and answers
# only requests that name that address, or localhost for people behind a tunnel. MLflow itself asks for no password.
set -euo pipefail

usage='usage: mlflow.sh install s3://BUCKET/FOLDER | serve s3://BUCKET/FOLDER ADDRESS'
command=${1:?$usage}
storage=${2:?$usage}
port=${RAYNIUM_MLFLOW_PORT:-5000}

case $command in
install)
    address=$(hostname -I | cut -d' ' -f1)
    sudo tee /etc/systemd/system/raynium-mlflow.service >/dev/null <<UNIT
[Unit]
Description=MLflow of the Raynium cluster
Wants=network-online.target
After=network-online.target
[Service]
User=$(id -un)
ExecStart=/bin/bash $(realpath "$0") serve $storage $address
Restart=always
RestartSec=2
[Install]
WantedBy=multi-user.target
UNIT
    sudo systemctl daemon-reload
    sudo systemctl enable --quiet raynium-mlflow
    sudo systemctl restart raynium-mlflow
    ;;
serve)
    address=${3:?$usage}
    set +u    # an activate script may read unset variables
    source "$HOME/.raynium-env"
    mkdir -p "$HOME/mlflow"
    exec mlflow server --host "$address" --port "$port" --workers 1 \
        --allowed-hosts "$address:$port,localhost:$port,127.0.0.1:$port" \
        --backend-store-uri "sqlite:///$HOME/mlflow/mlflow.db" --artifacts-destination "$storage/mlflow"
    ;;
*)
    echo "$usage" >&2
    exit 1
    ;;
esac
