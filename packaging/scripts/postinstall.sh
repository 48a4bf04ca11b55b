#!/bin/sh
# Runs after unpacking. dpkg passes "configure" and the previous version, rpm the number of installed versions.
set -e
case "$1" in
configure | [0-9]*) ;;
*) exit 0 ;;
esac

if command -v systemd-sysusers >/dev/null; then
	systemd-sysusers /usr/lib/sysusers.d/masque.conf
elif ! getent passwd masque >/dev/null; then
	useradd --system --user-group --no-create-home --home-dir /var/lib/masque --shell /usr/sbin/nologin --comment "MASQUE VPN" masque
fi

# Root writes the files, and the services read them through their group.
if [ ! -d /etc/masque ]; then
	mkdir /etc/masque
	chown root:masque /etc/masque
	chmod 2750 /etc/masque
fi

if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
	# Do not restart running services: the administrator chooses when to interrupt sessions.
	running=$(systemctl list-units --plain --no-legend --state=active 'masque-*.service' | cut -d ' ' -f 1 | tr '\n' ' ')
	if [ -n "$running" ]; then
		echo "masquevpn: these services still run the previous version; restart them when convenient: systemctl restart $running"
	fi
fi
