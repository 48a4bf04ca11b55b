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

// All tests can run in variants (`make e2e-matrix`). These flags select two of
// them. GOFLAGS selects the others, the stock quic-go and the race detector,
// for the tests and the programs together.
var (
	tunOffload = flag.Bool("tun-offload", true, "tun.offload of the programs")
	udpOffload = flag.Bool("udp-offload", true,
		"use UDP GSO and GRO; false: refuse them like Linux before 4.18")
)

// tunTable returns the configuration of the variant for either program.
func tunTable() string {
	if *tunOffload {
		return ""
	}
	return "\n[tun]\noffload = false\n"
}

// refuseUDPOffload makes the kernel answer ENOPROTOOPT to the socket options
// for UDP GSO and GRO, in this process and its descendants, for good.
func refuseUDPOffload() error {
	// Offsets in struct seccomp_data. Those of arguments are offsets of their
	// low 32 bits.
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

// findRaces makes the programs write the reports of the race detector to dir.
// Programs of any user can write there.
func findRaces(dir string) error {
	if err := os.Mkdir(dir, 0o777); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o1777); err != nil {
		return err
	}
	return os.Setenv("GORACE", "log_path="+filepath.Join(dir, "race"))
}

// races returns the reports of the race detector.
func races(dir string) (found string) {
	files, _ := filepath.Glob(filepath.Join(dir, "*"))
	for _, f := range files {
		b, err := os.ReadFile(f)
		found += fmt.Sprintf("%s%v\n", b, err)
	}
	return found
}

// builtWith returns the build settings that select a variant.
func builtWith(b *debug.BuildInfo) string {
	s := map[string]string{}
	for _, setting := range b.Settings {
		s[setting.Key] = setting.Value
	}
	return fmt.Sprintf("-race=%s -tags=%s", s["-race"], s["-tags"])
}

// The variant is in effect in the builds, the logs and the packets of the
// programs.
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
	if _, patched := reflect.TypeFor[quic.Config]().FieldByName("Uncontrolled"); patched != congestion.Selectable {
		t.Errorf("quic-go is patched: %t, want %t", patched, congestion.Selectable)
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

	const single = 1514 // longest frame of one packet, in bytes

	type largest struct{ in, out atomic.Int64 } // longest packet in each direction, in bytes
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
		name    string
		size    int64 // largest packet, in bytes
		allowed bool  // several packets may be combined
		sure    bool  // several packets are always combined at some time
	}{
		{"from the client's host into its device", device.out.Load(), *tunOffload, *tunOffload},
		{"from the client's device to its host", device.in.Load(), *tunOffload, false},
		// Stock quic-go combines packets only rarely.
		{"from the client to the proxy", wire.out.Load(), *udpOffload, *udpOffload &&
			congestion.Selectable},
		{"from the proxy to the client", wire.in.Load(), *udpOffload, false},
	} {
		if tc.size == 0 || tc.size > single && !tc.allowed || tc.size <= single && tc.sure {
			t.Errorf("%s: the largest packet has %d bytes; combined packets: allowed %t, sure %t",
				tc.name, tc.size, tc.allowed, tc.sure)
		}
	}
}
