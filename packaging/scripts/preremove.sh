#!/bin/sh
# Before removal: deb calls it with "remove", rpm with 0; an upgrade stops nothing.
set -e
case "$1" in
remove | 0) ;;
*) exit 0 ;;
esac

down() {
	masque-client down "$1" || echo "masquevpn: the tunnel $1 does not stop" >&2
}

# All tunnels, also those that `masque-client up` started: what a service leaves closed when it is stopped, `down` lifts.
for socket in /run/masque/*.sock; do
	name=$(basename "$socket" .sock)
	if [ -S "$socket" ] && [ "$name" != proxy ]; then
		down "$name"
	fi
done
if [ -d /run/systemd/system ]; then
	systemctl stop masque-proxy.socket masque-proxy.service 'masque-client@*.service'
fi
# And kill switches of tunnels that run no more.
if command -v nft >/dev/null; then
	for name in $(nft list tables inet 2>/dev/null | sed -n 's/^table inet masquevpn-kill-//p'); do
		down "$name"
	done
fi
