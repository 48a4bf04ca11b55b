#!/bin/sh
# The network of containers as dockerd makes it with its nftables-backed
# iptables: a bridge, its chains, a policy of DROP for what is forwarded, and
# for each container a veth pair, a namespace and a published port.
#
#   bridge.sh daemon    makes the chains and the bridge, or restores them
#   bridge.sh up N      container N, 1 to 254
#   bridge.sh down N
set -e
subnet=172.17.0.0/16

# once TABLE ARGUMENTS... adds a rule if it is missing, as dockerd does.
once() {
	table=$1 action=$2 chain=$3
	shift 3
	iptables-nft -w -t "$table" -C "$chain" "$@" 2>/dev/null || iptables-nft -w -t "$table" "$action" "$chain" "$@"
}

case $1 in
daemon) # try again, because firewalld may flush the chains at the same time
	for try in 1 2 3 4 5; do
		if "$0" chains; then exit 0; fi
		sleep 0.5
	done
	exit 1
	;;
chains)
	ip link show docker0 >/dev/null 2>&1 || {
		ip link add docker0 type bridge
		ip addr add 172.17.0.1/16 dev docker0
		ip link set docker0 up
	}
	echo 1 >/proc/sys/net/ipv4/ip_forward
	iptables-nft -w -P FORWARD DROP
	for chain in DOCKER DOCKER-ISOLATION-STAGE-1 DOCKER-ISOLATION-STAGE-2; do
		iptables-nft -w -N $chain 2>/dev/null || iptables-nft -w -F $chain
	done
	# The administrator's chain, which accepts packets of the tunnel.
	iptables-nft -w -N DOCKER-USER 2>/dev/null || true
	once filter -A DOCKER-USER -i masque0 -j ACCEPT
	once filter -A DOCKER-USER -o masque0 -j ACCEPT
	iptables-nft -w -t nat -N DOCKER 2>/dev/null || iptables-nft -w -t nat -F DOCKER
	once filter -I FORWARD -o docker0 -j DOCKER
	once filter -I FORWARD -i docker0 -o docker0 -j ACCEPT
	once filter -I FORWARD -i docker0 ! -o docker0 -j ACCEPT
	once filter -I FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
	iptables-nft -w -D FORWARD -j DOCKER-USER 2>/dev/null || true
	iptables-nft -w -D FORWARD -j DOCKER-ISOLATION-STAGE-1 2>/dev/null || true
	iptables-nft -w -I FORWARD -j DOCKER-ISOLATION-STAGE-1
	iptables-nft -w -I FORWARD -j DOCKER-USER
	iptables-nft -w -A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
	iptables-nft -w -A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
	once nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
	once nat -A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
	once nat -I POSTROUTING -s $subnet ! -o docker0 -j MASQUERADE
	;;
up)
	"$0" down "$2" 2>/dev/null || true # left by a failed round
	address=172.17.1.$2
	ip netns add "box$2"
	ip link add "veth$2" type veth peer name eth0 netns "box$2"
	ip link set "veth$2" master docker0 up
	ip -n "box$2" link set lo up
	ip -n "box$2" addr add $address/16 dev eth0
	ip -n "box$2" link set eth0 up
	ip -n "box$2" route add default via 172.17.0.1
	iptables-nft -w -t nat -A DOCKER ! -i docker0 -p tcp --dport $((8000 + $2)) -j DNAT --to-destination $address:80
	iptables-nft -w -A DOCKER -d $address ! -i docker0 -o docker0 -p tcp --dport 80 -j ACCEPT
	;;
down)
	address=172.17.1.$2
	iptables-nft -w -t nat -D DOCKER ! -i docker0 -p tcp --dport $((8000 + $2)) -j DNAT --to-destination $address:80 || true
	iptables-nft -w -D DOCKER -d $address ! -i docker0 -o docker0 -p tcp --dport 80 -j ACCEPT || true
	ip netns pids "box$2" | xargs -r kill
	ip link del "veth$2"
	ip netns del "box$2"
	;;
esac
