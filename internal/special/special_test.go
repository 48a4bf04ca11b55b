package special

import (
	"net/netip"
	"testing"
)

func TestForbiddenServer(t *testing.T) {
	for _, tt := range []struct {
		addr              string
		forbidden, toPeer bool
	}{
		{"192.0.2.1", false, false},
		{"2001:db8::1", false, false},
		{"127.0.0.1", true, true},
		{"::1", true, true},
		{"::ffff:127.0.0.1", true, true},
		{"::127.0.0.1", true, true},
		{"0.1.2.3", true, true},
		{"169.254.169.254", true, true},
		{"fe80::1", true, true},
		{"fe80::1%eth0", true, true},
		{"100.100.100.200", true, true},
		{"224.0.0.1", true, true},
		{"240.0.0.1", true, true},
		{"255.255.255.255", true, true},
		{"ff02::1", true, true},
		{"10.1.2.3", false, true},
		{"172.31.255.255", false, true},
		{"172.32.0.1", false, false},
		{"192.168.1.1", false, true},
		{"100.64.0.1", false, true},
		{"fd00::1", false, true},
		{"64:ff9b::127.0.0.1", true, true},
		{"64:ff9b::10.0.0.1", false, true},
		{"64:ff9b::192.0.2.1", false, false},
		{"64:ff9b:1::127.0.0.1", true, true},
		{"64:ff9b:1:7f00:0:100::", true, true}, // 127.0.0.1 below the /48
		{"64:ff9b:1::192.0.2.1", false, false},
		{"2002:7f00:1::1", true, true},
		{"2002:a9fe:a9fe::1", true, true},
		{"2002:c0a8:101::1", false, true},
		{"2002:c000:201::1", false, false},
	} {
		t.Run(tt.addr, func(t *testing.T) {
			a := netip.MustParseAddr(tt.addr)
			if got := ForbiddenServer(a, true); got != tt.forbidden {
				t.Errorf("with private networks: got %v, want %v", got, tt.forbidden)
			}
			if got := ForbiddenServer(a, false); got != tt.toPeer {
				t.Errorf("without private networks: got %v, want %v", got, tt.toPeer)
			}
		})
	}
}
