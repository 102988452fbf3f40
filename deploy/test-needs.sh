#!/bin/sh
# What the tests need beside Python: real servers to talk to. Installed by apt where that is possible.
set -eu

missing=""
command -v redis-server >/dev/null || missing="$missing redis-server"
command -v redis-cli >/dev/null || missing="$missing redis-tools"
command -v prometheus >/dev/null || missing="$missing prometheus"
command -v openssl >/dev/null || missing="$missing openssl"
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing$missing"
    apt-get update -qq
    # shellcheck disable=SC2086  # a list of packages
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
else
    echo "the tests need$missing; on Debian or Ubuntu: sudo apt-get install$missing" >&2
    exit 1
fi
