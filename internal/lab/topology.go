package lab

import (
	"fmt"
	"net/netip"
)

// Addresses of the standard topology.
var (
	ClientIPv4 = netip.MustParseAddr("198.51.100.2") // first client
	ClientIPv6 = netip.MustParseAddr("2001:db8:1::2")
	ProxyIPv4  = netip.MustParseAddr("203.0.113.5") // proxy, from the clients' side
	ProxyIPv6  = netip.MustParseAddr("2001:db8:2::5")
	TargetIPv4 = netip.MustParseAddr("192.0.2.2") // target, behind the proxy
	TargetIPv6 = netip.MustParseAddr("2001:db8:3::2")
)

// ProxyName is the proxy's name in /etc/hosts of every client of the standard
// topology.
const ProxyName = "proxy.example"

// maxClients is the capacity of the addressing plan.
const maxClients = 250

// TopologyOptions configures the standard topology. The zero value has one
// client and links without impairment.
type TopologyOptions struct {
	Clients int // number of clients; 0: 1
	// ClientMTU is the MTU of the links between clients and router, in bytes,
	// at least 1280. 0: 1500.
	ClientMTU int

	// Impair, if not nil, makes the links between clients and router wires with
	// this impairment, which can be changed later.
	Impair *Impairment
	Seed   uint64 // seed of the wires

	// Pool is routed from the target to the proxy, for a proxy without NAT.
	Pool []netip.Prefix
}

// Topology is the standard network:
//
//	client --- router --- proxy --- target
//
//	client  198.51.100.2/24, 2001:db8:1::2/64   eth0
//	router  198.51.100.1/24, 2001:db8:1::1/64   client1
//	        203.0.113.1/24,  2001:db8:2::1/64   proxy
//	proxy   203.0.113.5/24,  2001:db8:2::5/64   eth0
//	        192.0.2.1/24,    2001:db8:3::1/64   eth1
//	target  192.0.2.2/24,    2001:db8:3::2/64   eth0
//
// Further clients have links of their own to the router: client number n, from
// 2, is 198.18.n.2/24 and 2001:db8:1:n::2/64. Clients and proxy have default
// routes to the router. The target has none, so that clients and target reach
// each other through the proxy or not at all.
type Topology struct {
	Lab     *Lab
	Client  *Host // the first of Clients
	Clients []*Host
	Router  *Host
	Proxy   *Host
	Target  *Host
	// Wires has one wire for each client. nil without Impair.
	Wires []*Wire
}

// NewTopology makes the standard topology in l.
func NewTopology(l *Lab, o TopologyOptions) (*Topology, error) {
	if o.Clients == 0 {
		o.Clients = 1
	}
	if o.Clients < 0 || o.Clients > maxClients {
		return nil, fmt.Errorf("lab: %d clients: must be 1 to %d", o.Clients, maxClients)
	}
	t := &Topology{Lab: l}
	for _, h := range []struct {
		name string
		host **Host
	}{{"router", &t.Router}, {"proxy", &t.Proxy}, {"target", &t.Target}} {
		var err error
		if *h.host, err = l.Host(h.name); err != nil {
			return nil, err
		}
	}
	if err := t.Router.Forward(); err != nil {
		return nil, err
	}
	err := l.Connect(
		End{t.Router, "proxy", Prefixes("203.0.113.1/24", "2001:db8:2::1/64")},
		End{t.Proxy, "eth0", Prefixes("203.0.113.5/24", "2001:db8:2::5/64")}, LinkOptions{})
	if err != nil {
		return nil, err
	}
	err = l.Connect(
		End{t.Proxy, "eth1", Prefixes("192.0.2.1/24", "2001:db8:3::1/64")},
		End{t.Target, "eth0", Prefixes("192.0.2.2/24", "2001:db8:3::2/64")}, LinkOptions{})
	if err != nil {
		return nil, err
	}
	if err := addDefaultRoutes(t.Proxy, "203.0.113.1", "2001:db8:2::1"); err != nil {
		return nil, err
	}
	for _, p := range o.Pool {
		via := netip.MustParseAddr("192.0.2.1")
		if p.Addr().Is6() {
			via = netip.MustParseAddr("2001:db8:3::1")
		}
		if err := t.Target.AddRoute(p, via); err != nil {
			return nil, err
		}
	}
	for n := 1; n <= o.Clients; n++ {
		if err := t.addClient(n, o); err != nil {
			return nil, err
		}
	}
	t.Client = t.Clients[0]
	return t, nil
}

// addClient makes client number n, from 1.
func (t *Topology) addClient(n int, o TopologyOptions) error {
	name, net4, net6 := "client", "198.51.100.", "2001:db8:1::"
	if n > 1 {
		name = fmt.Sprintf("client%d", n)
		net4, net6 = fmt.Sprintf("198.18.%d.", n), fmt.Sprintf("2001:db8:1:%d::", n)
	}
	h, err := t.Lab.Host(name)
	if err != nil {
		return err
	}
	client := End{h, "eth0", Prefixes(net4+"2/24", net6+"2/64")}
	router := End{t.Router, fmt.Sprintf("client%d", n), Prefixes(net4+"1/24", net6+"1/64")}
	if o.Impair == nil {
		err = t.Lab.Connect(client, router, LinkOptions{MTU: o.ClientMTU})
	} else {
		var w *Wire
		w, err = t.Lab.Wire(client, router,
			WireOptions{MTU: o.ClientMTU, Impairment: *o.Impair, Seed: o.Seed + uint64(2*n)})
		t.Wires = append(t.Wires, w)
	}
	if err != nil {
		return err
	}
	if err := addDefaultRoutes(h, net4+"1", net6+"1"); err != nil {
		return err
	}
	t.Clients = append(t.Clients, h)
	return h.Resolve(ProxyName, ProxyIPv4, ProxyIPv6)
}

func addDefaultRoutes(h *Host, via ...string) error {
	for _, v := range via {
		if err := h.AddDefaultRoute(netip.MustParseAddr(v)); err != nil {
			return err
		}
	}
	return nil
}
