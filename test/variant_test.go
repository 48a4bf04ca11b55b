package test

import (
	"debug/buildinfo"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/quic-go/quic-go"
	"golang.org/x/sys/unix"

	"masquevpn/internal/congestion"
	"masquevpn/internal/lab"
)

// All tests run in variants (`make e2e-matrix`). These flags make two of them.
// The others, the stock quic-go and the race detector, are in how the tests are
// built, and the programs are built like the tests: both by GOFLAGS.
var (
	tunOffload = flag.Bool("tun-offload", true, "tun.offload of the programs")
	udpOffload = flag.Bool("udp-offload", true,
		"whether the kernel has UDP GSO and GRO, or refuses them as Linux did before 4.18")
)

// tunTable is what the variant adds to the configuration of a program, of
// either kind.
func tunTable() string {
	if *tunOffload {
		return ""
	}
	return "\n[tun]\noffload = false\n"
}

// refuseUDPOffload makes the kernel answer ENOPROTOOPT to the socket options
// for UDP GSO and GRO, for this process and all that it starts. They cannot be
// had back.
func refuseUDPOffload() error {
	// offsets in struct seccomp_data; of arguments, the low half
	const nr, level, option = 0, 24, 32
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: nr},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_SETSOCKOPT, Jt: 1},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_GETSOCKOPT, Jf: 6},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: level},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.IPPROTO_UDP, Jf: 4},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: option},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.UDP_SEGMENT, Jt: 1},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.UDP_GRO, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOPROTOOPT)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	thread, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
		unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program)))
	if errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	if thread != 0 {
		return fmt.Errorf("seccomp: thread %d has a filter of its own", thread)
	}
	return nil
}

// findRaces lets the programs write what the race detector finds into dir,
// where they may run as any user.
func findRaces(dir string) error {
	if err := os.Mkdir(dir, 0o777); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o1777); err != nil {
		return err
	}
	return os.Setenv("GORACE", "log_path="+filepath.Join(dir, "race"))
}

// races returns what the race detector found in the programs.
func races(dir string) (found string) {
	files, _ := filepath.Glob(filepath.Join(dir, "*"))
	for _, f := range files {
		b, err := os.ReadFile(f)
		found += fmt.Sprintf("%s%v\n", b, err)
	}
	return found
}

// builtWith returns what of a build makes a variant.
func builtWith(b *debug.BuildInfo) string {
	s := map[string]string{}
	for _, setting := range b.Settings {
		s[setting.Key] = setting.Value
	}
	return fmt.Sprintf("-race=%s -tags=%s", s["-race"], s["-tags"])
}

// The variant is in effect: in how the programs were built, in what they say,
// and in the packets.
func TestVariant(t *testing.T) {
	own, _ := debug.ReadBuildInfo()
	t.Logf("%s, TUN offload %t, UDP offload %t", builtWith(own), *tunOffload, *udpOffload)
	for _, name := range []string{"masque-client", "masque-proxy"} {
		b, err := buildinfo.ReadFile(program(name))
		check(t, err)
		if builtWith(b) != builtWith(own) {
			t.Errorf("%s was built with %s, the tests with %s", name, builtWith(b), builtWith(own))
		}
	}
	if _, edited := reflect.TypeFor[quic.Config]().FieldByName("Uncontrolled"); edited != congestion.Selectable {
		t.Errorf("quic-go is edited: %t, want %t", edited, congestion.Selectable)
	}

	p := newPair(t, options{})
	p.connect(p.Client, "alice")
	for name, text := range map[string]string{"client": p.clientLog("alice"),
		"proxy": p.log(p.server)} {
		if strings.Contains(text, "by a stock quic-go") == congestion.Selectable {
			t.Errorf("the %s has the other quic-go:\n%s", name, text)
		}
		if strings.Contains(text, "gso=false gro=false") == *udpOffload {
			t.Errorf("the %s sees another kernel:\n%s", name, text)
		}
	}

	const single = 1514 // the most that a packet has here, with its Ethernet header

	type largest struct{ in, out atomic.Int64 } // bytes of a packet
	watch := func(iface string) *largest {
		var l largest
		_, err := p.Client.Capture(iface, func(pkt lab.Packet) bool {
			n := &l.in
			if pkt.Outgoing {
				n = &l.out
			}
			n.Store(max(n.Load(), int64(len(pkt.Data()))))
			return false
		})
		check(t, err)
		return &l
	}
	device, wire := watch("masque0"), watch("eth0")
	p.transfer(p.Client, p.Target, lab.TargetIPv4, 16<<20)
	p.transfer(p.Target, p.Client, client4, 16<<20)
	for _, tc := range []struct {
		what    string
		size    int64
		allowed bool // several packets in one piece
		sure    bool // certain to come so
	}{
		{"from the client's host into its device", device.out.Load(), *tunOffload, *tunOffload},
		{"from the client's device to its host", device.in.Load(), *tunOffload, false},
		// stock: seldom
		{"from the client to the proxy", wire.out.Load(), *udpOffload, *udpOffload &&
			congestion.Selectable},
		{"from the proxy to the client", wire.in.Load(), *udpOffload, false},
	} {
		if tc.size == 0 || tc.size > single && !tc.allowed || tc.size <= single && tc.sure {
			t.Errorf("%s: the largest packet has %d bytes; several in one piece: allowed %t, sure %t", tc.what, tc.size, tc.allowed, tc.sure)
		}
	}
}
