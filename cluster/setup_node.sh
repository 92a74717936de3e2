#!/usr/bin/env bash
# Prepares one node, head or worker: `bash setup_node.sh neuron|cpu`. Ray runs it over ssh when a node starts and when
# the cluster file changes, so it may run twice.
#
# neuron: into the Python environment of AWS's image, whose torch and Neuron packages stay as they are.
# cpu:    into a new one, with the versions of constraints.txt.
# Either way ~/.raynium-env then puts it on the path; the Ray commands of the cluster file begin by reading it.
set -euo pipefail

kind=${1:?usage: setup_node.sh neuron|cpu}
checkout=$(cd "$(dirname "$0")/.." && pwd)
images=${RAYNIUM_IMAGE_VENVS:-/opt}    # where AWS's images keep their Python environments
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT

# The first boot still installs packages; exit status 2 means "done, with warnings".
if command -v cloud-init >/dev/null; then
    cloud-init status --wait >/dev/null || [ $? -eq 2 ]
fi

case $kind in
neuron)
    shopt -s nullglob
    found=("$images"/aws_neuronx_venv_torch_neuronx_* "$images"/aws_neuronx_venv_pytorch_[0-9]*)
    if [ ${#found[@]} -eq 0 ]; then
        echo "no aws_neuronx_venv_* for training under $images: this image is not a PyTorch Neuron image." \
             "Render the cluster file with --image (cluster/README.md, step 3)" >&2
        exit 1
    fi
    environment=${found[0]}
    [ -w "$environment" ] || sudo chown -R "$(id -u):$(id -g)" "$environment"
    # Every node needs the same Ray. What the image brings for the device is pinned to what it brings.
    grep -E '^ray==' "$checkout/constraints.txt" >"$constraints"
    "$environment/bin/pip" list --format=freeze | grep -iE '^(torch|numpy|nki|.*neuron)[a-z_-]*==' >>"$constraints"
    ;;
cpu)
    environment=$HOME/raynium-venv
    if [ ! -x "$environment/bin/python" ]; then
        if ! python3 -c 'import ensurepip' 2>/dev/null; then
            for _ in {1..60}; do    # the first boot's own updates hold the locks for minutes
                sudo apt-get update -qq && break
                sleep 5
            done
            sudo apt-get install -y -qq -o DPkg::Lock::Timeout=300 python3-venv
        fi
        python3 -m venv "$environment"
    fi
    cp "$checkout/constraints.txt" "$constraints"
    ;;
*)
    echo "setup_node.sh takes neuron or cpu, not $kind" >&2
    exit 1
    ;;
esac

"$environment/bin/pip" install --quiet --disable-pip-version-check -c "$constraints" -e "$checkout"

chmod 600 "$HOME/.ray/auth_token"    # the cluster's token: whoever can read it can run code here
{
    echo "source $environment/bin/activate"
    echo 'export RAY_AUTH_MODE=token'
    echo 'export RAY_USAGE_STATS_ENABLED=0'    # nothing is sent to anybody
    # Ray's workers, and so the ranks, at the priority of other processes; Ray's default adds 15.
    echo 'export RAY_worker_niceness=0'
    # The head has the image of the workers and no device: importing torch must not look for one.
    [ -e /dev/neuron0 ] || echo 'export TORCH_DEVICE_BACKEND_AUTOLOAD=0'
} >"$HOME/.raynium-env"
grep -qxF 'source ~/.raynium-env' "$HOME/.bashrc" || echo 'source ~/.raynium-env' >>"$HOME/.bashrc"
