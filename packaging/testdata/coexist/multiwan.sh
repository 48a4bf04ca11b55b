#!/bin/sh
# The rules of mwan3 for one interface, eth0, loaded as mwan3 does: eight bits of
# the mark (0x3f00), kept in the connection's mark, a table for the interface, and
# rules for the marks. Most traffic has the policy "default", the main table.
#
#   multiwan.sh load GATEWAY    loads the rules, or replaces them
#   multiwan.sh unload
set -e

unload() {
	for priority in 1001 2001 2061 2062 3001; do
		while ip rule del priority $priority 2>/dev/null; do :; done
	done
	ip route flush table 1 2>/dev/null || true
	iptables-nft -w -t mangle -D PREROUTING -j mwan3_hook 2>/dev/null || true
	iptables-nft -w -t mangle -D OUTPUT -j mwan3_hook 2>/dev/null || true
}

case $1 in
unload) unload ;;
load)
	unload
	iptables-nft-restore -w --noflush <<-END
		*mangle
		:mwan3_hook -
		:mwan3_connected -
		:mwan3_ifaces_in -
		:mwan3_iface_in_wan -
		:mwan3_policy_wan_only -
		:mwan3_rules -
		-F mwan3_hook
		-F mwan3_connected
		-F mwan3_ifaces_in
		-F mwan3_iface_in_wan
		-F mwan3_policy_wan_only
		-F mwan3_rules
		-A mwan3_connected -d 192.168.7.0/24 -j MARK --set-xmark 0x3f00/0x3f00
		-A mwan3_connected -d 127.0.0.0/8 -j MARK --set-xmark 0x3f00/0x3f00
		-A mwan3_iface_in_wan -i eth0 -m mark --mark 0x0/0x3f00 -j MARK --set-xmark 0x100/0x3f00
		-A mwan3_ifaces_in -m mark --mark 0x0/0x3f00 -j mwan3_iface_in_wan
		-A mwan3_policy_wan_only -m mark --mark 0x0/0x3f00 -j MARK --set-xmark 0x100/0x3f00
		-A mwan3_rules -d 192.168.50.0/24 -m mark --mark 0x0/0x3f00 -j mwan3_policy_wan_only
		-A mwan3_rules -m mark --mark 0x0/0x3f00 -j MARK --set-xmark 0x3f00/0x3f00
		-A mwan3_hook -j CONNMARK --restore-mark --nfmask 0x3f00 --ctmask 0x3f00
		-A mwan3_hook -m mark --mark 0x0/0x3f00 -j mwan3_ifaces_in
		-A mwan3_hook -m mark --mark 0x0/0x3f00 -j mwan3_connected
		-A mwan3_hook -m mark --mark 0x0/0x3f00 -j mwan3_rules
		-A mwan3_hook -j CONNMARK --save-mark --nfmask 0x3f00 --ctmask 0x3f00
		-A PREROUTING -j mwan3_hook
		-A OUTPUT -j mwan3_hook
		COMMIT
	END
	ip route replace default via "$2" dev eth0 table 1 || true # fails while eth0 has no address
	ip rule add priority 1001 iif eth0 lookup 1
	ip rule add priority 2001 fwmark 0x100/0x3f00 lookup 1
	ip rule add priority 2061 fwmark 0x3d00/0x3f00 blackhole
	ip rule add priority 2062 fwmark 0x3e00/0x3f00 unreachable
	ip rule add priority 3001 fwmark 0x100/0x3f00 unreachable
	;;
esac
