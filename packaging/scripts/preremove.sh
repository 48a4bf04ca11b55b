#!/bin/sh
# Runs before removal. dpkg passes "remove", rpm passes 0. An upgrade stops nothing.
set -e
case "$1" in
remove | 0) ;;
*) exit 0 ;;
esac

down() {
	masque-client down "$1" || echo "masquevpn: cannot end the tunnel $1" >&2
}

# End all tunnels, including those of `masque-client up`. `down` also opens kill switches, which stopping a service does not.
for socket in /run/masque/*.sock; do
	name=$(basename "$socket" .sock)
	if [ -S "$socket" ] && [ "$name" != proxy ]; then
		down "$name"
	fi
done
if [ -d /run/systemd/system ]; then
	systemctl stop masque-proxy.socket masque-proxy.service 'masque-client@*.service'
fi
# Open the kill switches of tunnels that no longer run.
if command -v nft >/dev/null; then
	for name in $(nft list tables inet 2>/dev/null | sed -n 's/^table inet masquevpn-kill-//p'); do
		down "$name"
	done
fi
