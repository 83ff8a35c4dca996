#!/bin/sh
# HAProxy for the rollout: Debian's package, installed by root, else unpacked into .haproxy/ without root.
# Where it cannot be had this says so and ends well: the tests that need it skip, and `rollout.py start` explains.
cd "$(dirname "$0")/../.." || exit 1
command -v haproxy >/dev/null || test -x /usr/sbin/haproxy || test -x .haproxy/haproxy && exit 0
if [ "$(id -u)" = 0 ] && { apt-get install -y -q --no-install-recommends haproxy ||
    { apt-get update -q && apt-get install -y -q --no-install-recommends haproxy; }; } >/dev/null 2>&1; then
    exit 0
fi
if mkdir -p .haproxy && (
    cd .haproxy && apt-get download haproxy >/dev/null 2>&1 || exit 1
    # needed by it, and on few machines; harmless where they are there already
    apt-get download liblua5.3-0 libopentracing-c-wrapper0 libopentracing1 >/dev/null 2>&1
    for package in *.deb; do dpkg -x "$package" . && rm "$package"; done
    # shellcheck disable=SC2016
    printf '%s\n' '#!/bin/sh' 'here=$(dirname "$(readlink -f "$0")")' \
        '# no empty part: the loader would take it for the current directory' \
        'for lib in "$here"/usr/lib/*/; do LD_LIBRARY_PATH="$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"; done' \
        'export LD_LIBRARY_PATH' \
        'exec "$here/usr/sbin/haproxy" "$@"' >haproxy
    chmod +x haproxy && ./haproxy -v >/dev/null
); then
    exit 0
fi
rm -rf .haproxy
echo "HAProxy could not be had (no apt-get, or no network): the rollout's tests that need it will be skipped" >&2
