#!/bin/sh
# After unpacking: deb calls it with "configure" and the version before, rpm with the number of versions installed.
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

# Root writes what is here, and the services read it.
if [ ! -d /etc/masque ]; then
	mkdir /etc/masque
	chown root:masque /etc/masque
	chmod 2750 /etc/masque
fi

if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
	# Somebody may be connected through what runs; when to interrupt that is theirs to choose.
	running=$(systemctl list-units --plain --no-legend --state=active 'masque-*.service' | cut -d ' ' -f 1 | tr '\n' ' ')
	if [ -n "$running" ]; then
		echo "masquevpn: still running as it was before; when convenient: systemctl restart $running"
	fi
fi
