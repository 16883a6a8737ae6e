#!/usr/bin/env bash
# An arm64 Debian in a folder, whose programs qemu runs: `root.sh make FOLDER`, then
# `root.sh run FOLDER COMMAND…`. Needs root, as chroot does; what it mounts ends with the command.
set -euo pipefail

RELEASE=trixie
PACKAGES=binutils,ca-certificates,libnuma1,python3
TOOLS="aarch64-linux-gnu-g++ arch-test mmdebstrap qemu-aarch64-static"
INSTALL="apt install arch-test g++-aarch64-linux-gnu mmdebstrap qemu-user-static"
BINFMT=/proc/sys/fs/binfmt_misc

register() {  # lasts until the machine stops
  [ -e $BINFMT/register ] || mount -t binfmt_misc binfmt_misc $BINFMT
  [ -e $BINFMT/qemu-aarch64 ] || cat /usr/lib/binfmt.d/qemu-aarch64.conf > $BINFMT/register
}

make() {
  for tool in $TOOLS; do
    command -v "$tool" > /dev/null || { echo "No $tool. On Debian: $INSTALL" >&2; exit 1; }
  done
  register
  rm -rf "$1"
  mmdebstrap --quiet --mode=root --arch=arm64 --variant=minbase --include=$PACKAGES \
    --format=directory $RELEASE "$1"
}

run() {
  register
  exec unshare --mount --propagation private bash -euc '
    mount -t proc proc "$0/proc"
    mount --rbind /dev "$0/dev"
    mount --rbind /sys "$0/sys"
    exec chroot "$0" "$@"' "$@"
}

"$1" "${@:2}"
