#!/usr/bin/env bash
# What a hosted machine lacks: a library of vLLM's CPU build, and namespaces in which users mount.
set -euo pipefail
sudo apt-get update
sudo apt-get install --yes libnuma1 "$@"
sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0
