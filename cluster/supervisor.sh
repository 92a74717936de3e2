#!/usr/bin/env bash
# The supervisor of a cluster, on its head:
#   supervisor.sh install ROOT    as a service that starts again when it dies and after a reboot
# It submits again, to this head, the runs under ROOT that an earlier driver or head left behind (`raynium supervisor`).
set -euo pipefail

usage='usage: supervisor.sh install s3://BUCKET/FOLDER/runs'
[ "${1:-}" = install ] || { echo "$usage" >&2; exit 1; }
root=${2:?$usage}

sudo tee /etc/systemd/system/raynium-supervisor.service >/dev/null <<UNIT
[Unit]
Description=Supervisor of the Raynium cluster's runs
Wants=network-online.target
After=network-online.target
[Service]
User=$(id -un)
ExecStart=/bin/bash -c "source ~/.raynium-env && exec raynium supervisor --root $root"
Restart=always
RestartSec=5
[Install]
WantedBy=multi-user.target
UNIT
sudo systemctl daemon-reload
sudo systemctl enable --quiet raynium-supervisor
sudo systemctl restart raynium-supervisor
