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
