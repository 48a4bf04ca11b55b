package routing

import (
	"fmt"
	"net"
	"net/netip"
)

// HostNetwork is an address of this host, with the prefix length of its
// network, and the interface that has it.
type HostNetwork struct {
	Address   netip.Prefix
	Interface string
}

// HostNetworks returns the addresses of all interfaces of this host, except the
// one with the name except.
func HostNetworks(except string) ([]HostNetwork, error) {
	links, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("routing: interfaces of this host: %w", err)
	}
	var list []HostNetwork
	for _, l := range links {
		if l.Name == except {
			continue
		}
		addrs, err := l.Addrs()
		if err != nil {
			continue // the interface was just deleted
		}
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok {
				list = append(list, HostNetwork{Address: prefixOf(n), Interface: l.Name})
			}
		}
	}
	return list, nil
}
