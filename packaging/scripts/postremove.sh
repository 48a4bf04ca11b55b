#!/bin/sh
# After removal: deb calls it with "remove", and with "purge" when nothing shall stay; rpm with 0.
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
	# What is in there was put there by hand: keys, users, configurations.
	if [ -d /etc/masque ] && ! rmdir /etc/masque 2>/dev/null; then
		echo "masquevpn: /etc/masque holds keys and configurations and is left alone"
	fi
fi
