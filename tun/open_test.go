package tun

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestOpen(t *testing.T) {
	eachBackend(t, func(t *testing.T, offload bool) {
		first := openDevice(t, Config{Offload: offload})
		second := openDevice(t, Config{Name: "vpn%d", MTU: 9000, Offload: offload})
		for d, want := range map[*Device]netlink.LinkAttrs{
			first:  {Name: "masque0", MTU: DefaultMTU},
			second: {Name: "vpn0", MTU: 9000},
		} {
			link, err := netlink.LinkByName(want.Name)
			if err != nil {
				t.Fatal(err)
			}
			got := link.Attrs()
			if d.Name() != want.Name || d.Index() != got.Index || d.MTU() != want.MTU ||
				got.MTU != want.MTU {
				t.Errorf("device %s, index %d, MTU %d; in the kernel %s, %d, %d; want %s, MTU %d",
					d.Name(), d.Index(), d.MTU(),
					got.Name, got.Index, got.MTU, want.Name, want.MTU)
			}
			if got.Flags&unix.IFF_UP != 0 {
				t.Errorf("%s is up", want.Name)
			}
			queue := plainQueueLen
			if offload {
				queue = offloadQueueLen
			}
			if got.TxQLen != queue {
				t.Errorf("%s has a queue of %d packets, want %d", want.Name, got.TxQLen, queue)
			}
		}
		if batch := first.BatchSize(); offload != (batch > 1) {
			t.Errorf("batch size %d", batch)
		}
	})
}

func TestOpenNotInherited(t *testing.T) {
	eachBackend(t, func(t *testing.T, offload bool) {
		openDevice(t, Config{Offload: offload})
		fds := descriptors(t, nodePath)
		if len(fds) != 1 {
			t.Fatalf("%d descriptors, want 1", len(fds))
		}
		flags, err := unix.FcntlInt(uintptr(fds[0]), unix.F_GETFD, 0)
		if err != nil {
			t.Fatal(err)
		}
		if flags&unix.FD_CLOEXEC == 0 {
			t.Error("child processes inherit the descriptor, want FD_CLOEXEC")
		}
	})
}

// TestOpenUndone checks that open removes a device that it cannot configure.
// Configuring fails because the netlink socket is in another network namespace.
func TestOpenUndone(t *testing.T) {
	eachBackend(t, func(t *testing.T, offload bool) {
		needTUN(t)
		var nl *netlink.Handle
		var err error
		onThread(func() {
			if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
				nl, err = netlink.NewHandle(unix.NETLINK_ROUTE)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		defer nl.Close()
		cfg, err := Config{Name: "undone0", Offload: offload}.withDefaults()
		if err != nil {
			t.Fatal(err)
		}
		d, err := open(cfg, nl)
		if err == nil {
			d.Close()
			t.Fatal("open found its device in another network namespace")
		}
		if _, err := netlink.LinkByName(cfg.Name); err == nil {
			t.Errorf("%s still exists", cfg.Name)
		}
	})
}

func TestOpenNameTaken(t *testing.T) {
	link := func(t *testing.T, l netlink.Link) string {
		if err := netlink.LinkAdd(l); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { netlink.LinkDel(l) })
		return l.Attrs().Name
	}
	others := map[string]func(t *testing.T) string{
		"loopback": func(*testing.T) string { return "lo" },
		"open offload device": func(t *testing.T) string {
			return openDevice(t, Config{Name: "taken0", Offload: true}).Name()
		},
		"open plain device": func(t *testing.T) string {
			return openDevice(t, Config{Name: "taken1"}).Name()
		},
		"persistent TUN": func(t *testing.T) string {
			return link(t, &netlink.Tuntap{
				LinkAttrs: netlink.LinkAttrs{Name: "taken2"},
				Mode:      netlink.TUNTAP_MODE_TUN,
				Flags:     netlink.TUNTAP_NO_PI | netlink.TUNTAP_ONE_QUEUE,
			})
		},
		"persistent TAP": func(t *testing.T) string {
			return link(t, &netlink.Tuntap{
				LinkAttrs: netlink.LinkAttrs{Name: "taken3"},
				Mode:      netlink.TUNTAP_MODE_TAP,
				Flags:     netlink.TUNTAP_NO_PI | netlink.TUNTAP_ONE_QUEUE,
			})
		},
	}
	eachBackend(t, func(t *testing.T, offload bool) {
		for kind, other := range others {
			t.Run(kind, func(t *testing.T) {
				needTUN(t)
				name := other(t)
				before, err := netlink.LinkByName(name)
				if err != nil {
					t.Fatal(err)
				}
				_, err = Open(Config{Name: name, Offload: offload})
				if !errors.Is(err, ErrNameTaken) {
					t.Fatalf("error %v, want ErrNameTaken", err)
				}
				wantText(t, err, name, "choose another name")
				if after, err := netlink.LinkByName(name); err != nil ||
					after.Attrs().Index != before.Attrs().Index {
					t.Errorf("the other device was replaced or removed: %v", err)
				}
			})
		}
	})
}

func TestOpenInvalid(t *testing.T) {
	for _, cfg := range []Config{
		{Name: "sixteen-letters0"}, {Name: "a/b"}, {Name: "a:b"}, {Name: "a b"}, {Name: "a\nb"},
		{Name: "é"},
		{Name: "."}, {Name: ".."}, {Name: "all"}, {Name: "default"}, {Name: "a%"}, {Name: "a%s"},
		{Name: "a%d%d"}, {Name: "a%d%"},
		{MTU: -1}, {MTU: MinMTU - 1}, {MTU: MaxMTU + 1},
	} {
		t.Run(fmt.Sprintf("name %q, MTU %d", cfg.Name, cfg.MTU), func(t *testing.T) {
			d, err := Open(cfg)
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("error %v, want ErrInvalid", err)
			}
			if err == nil {
				d.Close()
			}
		})
	}
}

func TestCheckName(t *testing.T) {
	for _, name := range []string{"masque0", "masque%d", "a", "fifteen-letters", "%d.x_y"} {
		t.Run(name, func(t *testing.T) {
			if err := CheckName(name); err != nil {
				t.Error(err)
			}
		})
	}
	if err := CheckName(""); !errors.Is(err, ErrInvalid) {
		t.Errorf("error %v for the empty name, want ErrInvalid", err)
	}
}

func TestOpenWithoutPermission(t *testing.T) {
	eachBackend(t, func(t *testing.T, offload bool) {
		needTUN(t)
		var d *Device
		var err error
		onThread(func() {
			header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var data [2]unix.CapUserData
			if err = unix.Capget(&header, &data[0]); err != nil {
				return
			}
			data[0].Effective &^= 1 << unix.CAP_NET_ADMIN
			if err = unix.Capset(&header, &data[0]); err != nil {
				return
			}
			d, err = Open(Config{Offload: offload})
		})
		if d != nil {
			d.Close()
		}
		if !errors.Is(err, ErrPermission) {
			t.Fatalf("error %v, want ErrPermission", err)
		}
		wantText(t, err, "CAP_NET_ADMIN")
	})
}

func TestOpenWithoutNode(t *testing.T) {
	eachBackend(t, func(t *testing.T, offload bool) {
		var d *Device
		var err error
		onThread(func() {
			if err = unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
				return
			}
			if err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return
			}
			if err = unix.Mount("none", "/dev", "tmpfs", 0, ""); err != nil {
				return
			}
			d, err = Open(Config{Offload: offload})
		})
		if d != nil {
			d.Close()
		}
		if !errors.Is(err, ErrUnsupported) {
			t.Fatalf("error %v, want ErrUnsupported", err)
		}
		wantText(t, err, "modprobe tun")
	})
}

// TestFallback makes the kernel refuse the ioctls that older kernels do not
// have.
func TestFallback(t *testing.T) {
	for reason, request := range map[string]uint32{"TUNSETOFFLOAD": unix.TUNSETOFFLOAD,
		"TUNGETFEATURES": unix.TUNGETFEATURES} {
		t.Run(reason, func(t *testing.T) {
			needTUN(t)
			var logs bytes.Buffer
			var d *Device
			var err error
			onThread(func() {
				if err = refuseIoctl(request); err == nil {
					d, err = Open(Config{Name: "masque7", Offload: true,
						Logger: slog.New(slog.NewTextHandler(&logs, nil))})
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			if d.Offload() || d.BatchSize() != 1 || d.Name() != "masque7" {
				t.Errorf("offload %v, batch size %d, name %s; want the plain device", d.Offload(),
					d.BatchSize(), d.Name())
			}
			if strings.Count(logs.String(), "\n") != 1 {
				t.Errorf("logged %q, want one line", logs.String())
			}
			wantText(t, errors.New(logs.String()), reason, "masque7", "invalid argument")
		})
	}
}

// refuseIoctl makes the kernel return EINVAL for an ioctl of this thread.
func refuseIoctl(request uint32) error {
	// Offsets in struct seccomp_data. The ioctl request is the low half of the
	// second argument.
	const offsetNr, offsetArg1 = 0, 24
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offsetNr},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_IOCTL, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offsetArg1},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: request, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EINVAL)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	return unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER,
		uintptr(unsafe.Pointer(&program)), 0, 0)
}

// wantText fails the test unless the text of err contains all parts.
func wantText(t *testing.T, err error, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not contain %q", err, part)
		}
	}
}
