#!/bin/sh
# Before removal: deb calls it with "remove", rpm with 0; an upgrade stops nothing.
set -e
case "$1" in
remove | 0) ;;
*) exit 0 ;;
esac

if [ -d /run/systemd/system ]; then
	systemctl stop masque-proxy.socket masque-proxy.service 'masque-client@*.service'
fi
# Tunnels that `masque-client up` started.
for socket in /run/masque/*.sock; do
	name=$(basename "$socket" .sock)
	if [ -S "$socket" ] && [ "$name" != proxy ]; then
		masque-client down "$name" || echo "masquevpn: the tunnel $name does not stop" >&2
	fi
done
