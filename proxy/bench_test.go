package proxy

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
)

// BenchmarkTable looks up the sessions of all addresses in turn, as dispatch
// does for each packet.
func BenchmarkTable(b *testing.B) {
	for _, n := range []int{1, 100, 10_000} {
		b.Run(fmt.Sprintf("sessions=%d", n), func(b *testing.B) {
			t := newTable()
			addrs := make([]netip.Addr, n)
			for i := range addrs {
				addrs[i] = addr4(i)
				t.insert(netip.PrefixFrom(addrs[i], 32), &ipSession{})
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if _, ok := t.lookup(addrs[i%n]); !ok {
					b.Fatalf("%v is not in the table", addrs[i%n])
				}
			}
		})
	}
}

// addr4 returns address i of 10.77.0.0/16. Consecutive numbers are not
// neighbours in the table.
func addr4(i int) netip.Addr {
	var a [4]byte
	binary.BigEndian.PutUint32(a[:], 10<<24|77<<16|uint32(uint16(i)*40503))
	return netip.AddrFrom4(a)
}

// BenchmarkReloadWithPeers reloads a proxy with 256 peers of four pairs each,
// all of which run.
func BenchmarkReloadWithPeers(b *testing.B) {
	const domains, pairs = 256, 4
	h := newPeerHub(b, func(c *Config) {
		c.Federation.Domains = nil
		for i := range pairs {
			c.Federation.Domains = append(c.Federation.Domains, fmt.Sprintf("a%d.example", i))
		}
		c.Peers, c.Sites = manyPeers(domains, pairs), nil
		c.MaxPendingPerAddress, c.MaxPending = domains, domains
		c.Logger = nil
	})
	for i := range domains {
		domain := fmt.Sprintf("b%d.example", i)
		_, h3 := h.dialAs(h.ca.issue(b, domain))
		for j := range pairs {
			g := h.link(h3, domain, fmt.Sprintf("a%d.example", j))
			g.advertise(h.cfg.Peers[i*pairs+j].Networks...)
		}
	}
	h.eventually("all networks are installed", func() bool {
		return len(h.kernel.Last().Routes) > 0 && len(setOf(h.kernel.Last().Routes).Prefixes()) ==
			len(setOf(h.networks()).Prefixes())
	})
	for i := 0; b.Loop(); i++ {
		cfg := h.cfg
		cfg.Federation.CA = h.ca.pool()
		if _, err := h.Reload(cfg); err != nil {
			b.Fatal(err)
		}
	}
	if n := len(h.Sessions()); n != domains*pairs {
		b.Errorf("%d sessions, want %d", n, domains*pairs)
	}
}

// networks returns the networks of all peers.
func (h *peerHub) networks() (all []netip.Prefix) {
	for _, p := range h.cfg.Peers {
		all = append(all, p.Networks...)
	}
	return all
}
