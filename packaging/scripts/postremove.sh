#!/bin/sh
# Runs after removal. dpkg passes "remove" or "purge", rpm passes 0.
set -e
case "$1" in
remove | purge | 0) ;;
*) exit 0 ;;
esac

if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
fi
if [ "$1" = purge ]; then
	rm -rf /run/masque /var/lib/masque
	rm -f /etc/systemd/system/*.wants/masque-proxy.service /etc/systemd/system/*.wants/masque-proxy.socket \
		/etc/systemd/system/*.wants/masque-client@*.service
	# The administrator made the keys, users and configurations, so keep them.
	if [ -d /etc/masque ] && ! rmdir /etc/masque 2>/dev/null; then
		echo "masquevpn: /etc/masque holds keys and configurations and was kept; remove it if you do not need them"
	fi
fi
