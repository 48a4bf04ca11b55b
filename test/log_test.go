package test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"

	"masquevpn/internal/lab"
)

// packetsIn lists the packets of a capture file: ICMPv4 packets with their
// type, other packets as "other". It ignores an incomplete last record, which a
// killed writer leaves.
func packetsIn(t *testing.T, file []byte) []string {
	t.Helper()
	r, err := pcapgo.NewReader(bytes.NewReader(file))
	check(t, err)
	if r.LinkType() != layers.LinkTypeRaw {
		t.Fatalf("the link type is %v", r.LinkType())
	}
	var packets []string
	for {
		data, _, err := r.ReadPacketData()
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return packets
		}
		check(t, err)
		p := gopacket.NewPacket(data, layers.LinkTypeRaw, gopacket.Default)
		if p.ErrorLayer() != nil || p.NetworkLayer() == nil {
			t.Fatalf("not a packet: %x", data)
		}
		flow := p.NetworkLayer().NetworkFlow()
		kind := "other"
		if icmp, ok := p.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4); ok {
			kind = icmp.TypeCode.String()
		}
		packets = append(packets, fmt.Sprintf("%v > %v %s", flow.Src(), flow.Dst(), kind))
	}
}

// hasEcho reports whether packets has an echo request and its reply between two
// addresses.
func hasEcho(packets []string, from, to any) bool {
	all := strings.Join(packets, "\n") + "\n"
	return strings.Contains(all, fmt.Sprintf("%v > %v EchoRequest\n", from, to)) &&
		strings.Contains(all, fmt.Sprintf("%v > %v EchoReply\n", to, from))
}

// wantPrivate checks that only the owner may read a file.
func wantPrivate(t *testing.T, name string) {
	t.Helper()
	info, err := os.Stat(name)
	check(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("%s has mode %v", name, info.Mode())
	}
}

// With all keys of [log] set, both ends write a qlog file and a key log, and
// the pcap file of the client has the packets of the tunnel, while it runs and
// afterwards.
func TestLogFiles(t *testing.T) {
	dir := t.TempDir()
	for _, end := range []string{"client", "proxy"} {
		check(t, os.Mkdir(filepath.Join(dir, end), 0o700))
	}
	log := func(end string) string {
		return fmt.Sprintf("\n[log]\nqlog_dir = %q\nkey_log = %q\n", filepath.Join(dir, end),
			filepath.Join(dir, end+".keys"))
	}
	pcap := filepath.Join(dir, "inside.pcap")
	check(t, os.WriteFile(pcap, []byte("of the run before"), 0o644))
	p := newPair(t, options{proxy: log("proxy"),
		client: log("client") + fmt.Sprintf("pcap = %q\n", pcap)})
	p.connect(p.Client, "alice")
	p.ping(p.Client, lab.TargetIPv4)
	p.eventually("an echo is in the pcap", func() bool {
		return hasEcho(packetsIn(t, readFile(t, pcap)), client4, lab.TargetIPv4)
	})
	p.down(p.Client, "alice")
	p.stopProxy()

	if !hasEcho(packetsIn(t, readFile(t, pcap)), client4, lab.TargetIPv4) {
		t.Error("the pcap has no echo at the end")
	}
	if before := readFile(t, pcap+".1"); string(before) != "of the run before" {
		t.Errorf("the file of the run before is %q", before)
	}
	wantPrivate(t, pcap)
	for _, end := range []string{"client", "proxy"} {
		wantPrivate(t, filepath.Join(dir, end+".keys"))
		if keys := readFile(t, filepath.Join(dir, end+".keys")); !bytes.Contains(keys,
			[]byte("CLIENT_TRAFFIC_SECRET_0 ")) {
			t.Errorf("%s: the key log is %q", end, keys)
		}
		files, err := filepath.Glob(filepath.Join(dir, end, "*.sqlog"))
		check(t, err)
		if len(files) != 1 {
			t.Errorf("%s: the files of qlog are %q", end, files)
			continue
		}
		wantPrivate(t, files[0])
		text := string(readFile(t, files[0]))
		for _, want := range []string{"transport:packet_sent", "transport:connection_closed",
			"http3:frame_", `"(not shown)"`, `"connect-ip"`} {
			if !strings.Contains(text, want) {
				t.Errorf("%s: qlog has no %s", end, want)
			}
		}
		if strings.Contains(text, "Bearer") {
			t.Errorf("%s: qlog has the token", end)
		}
	}
}

// The capture command of a running pair writes the packets of all sessions of
// the proxy, of one session, or of the client. The file can be read during the
// capture.
func TestCapture(t *testing.T) {
	p := newPair(t, options{clients: 2})
	p.connect(p.Clients[0], "alice")
	p.connect(p.Clients[1], "bob")
	bob4 := client4.Next()
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name+".pcap") }
	capture := func(host *lab.Host, name, prog string, args ...string) *lab.Cmd {
		c := host.Command(p.ctx, program(prog),
			append([]string{"capture", "-o", file(name)}, args...)...)
		check(t, c.Start())
		p.eventually("the capture "+name+" has begun", func() bool {
			info, err := os.Stat(file(name))
			return err == nil && info.Size() >= 24
		})
		return c
	}
	all := capture(p.Proxy, "all", "masque-proxy")
	one := capture(p.Proxy, "one", "masque-proxy", "2")
	alice := capture(p.Clients[0], "alice", "masque-client", "alice")
	killed := capture(p.Clients[0], "killed", "masque-client", "alice")
	few := capture(p.Clients[1], "few", "masque-client", "bob", "--count", "2", "--snaplen", "20")
	p.ping(p.Clients[0], lab.TargetIPv4)
	p.ping(p.Clients[1], lab.TargetIPv4)

	for _, x := range []struct {
		name       string
		alice, bob bool
	}{{"all", true, true}, {"one", false, true}, {"alice", true, false}, {"killed", true, false}} {
		p.eventually("the running capture "+x.name+" has the expected echoes", func() bool {
			packets := packetsIn(t, readFile(t, file(x.name)))
			return hasEcho(packets, client4, lab.TargetIPv4) == x.alice &&
				hasEcho(packets, bob4, lab.TargetIPv4) == x.bob
		})
		wantPrivate(t, file(x.name))
	}

	// The captures end by SIGINT, by SIGKILL, after a number of packets, with
	// their session, and with the captured program.
	check(t, alice.Signal(syscall.SIGINT))
	check(t, alice.Wait())
	if log := p.log(alice); !strings.Contains(log,
		" packets captured, 0 more were not written in time") {
		t.Errorf("the output ends with %s", log)
	}
	check(t, killed.Signal(syscall.SIGKILL))
	_ = killed.Wait()
	p.ping(p.Clients[0], lab.TargetIPv4) // the tunnel continues
	check(t, few.Wait())
	if records := truncatedPackets(t, readFile(t, file("few"))); records != 2 {
		t.Errorf("%d packets instead of 2", records)
	}
	p.down(p.Clients[1], "bob")
	check(t, one.Wait())
	p.stopProxy()
	check(t, all.Wait())
	if log := p.log(all); !strings.Contains(log, " packets captured, 0 more") {
		t.Errorf("the output ends with %s", log)
	}
	p.down(p.Clients[0], "alice")
}

// truncatedPackets checks that all packets of a capture are cut to 20 bytes,
// and returns their number.
func truncatedPackets(t *testing.T, file []byte) (n int) {
	t.Helper()
	r, err := pcapgo.NewReader(bytes.NewReader(file))
	check(t, err)
	for ; ; n++ {
		data, info, err := r.ReadPacketData()
		if err == io.EOF {
			return n
		}
		check(t, err)
		if len(data) != 20 || info.Length <= 20 {
			t.Errorf("%d of %d bytes are kept", len(data), info.Length)
		}
	}
}

// The capture command names the reason when it cannot capture, and creates no
// file.
func TestCaptureRefusals(t *testing.T) {
	p := newPair(t, options{})
	file := filepath.Join(t.TempDir(), "x.pcap")
	for _, x := range []struct {
		name    string
		program string
		args    []string
		code    int
		last    string // in the last line of the output
	}{
		{"no session", "masque-proxy", []string{"7", "-o", file}, 3,
			`"7": there is no such session: list them with: masque-proxy sessions`},
		{"no proxy", "masque-proxy", []string{"-o", file, "--run-dir", t.TempDir()}, 3,
			"no proxy is running"},
		{"no length", "masque-proxy", []string{"-o", file, "--snaplen", "0"}, 2,
			"--snaplen 0: write a number from 1 to 65536"},
		{"negative count", "masque-proxy", []string{"-o", file, "--count", "-1"}, 2,
			"invalid argument"},
		{"no output", "masque-proxy", nil, 2, `required flag(s) "output" not set`},
		{"no tunnel", "masque-client", []string{"none", "-o", file}, 3,
			"none: not running: start it with: masque-client up none"},
		{"no name", "masque-client", []string{"-o", file}, 2, "accepts 1 arg(s), received 0"},
	} {
		t.Run(x.name, func(t *testing.T) {
			c := p.Proxy.Command(p.ctx, program(x.program),
				append([]string{"capture"}, x.args...)...)
			out, _ := c.CombinedOutput()
			if c.ExitCode() != x.code || !strings.Contains(lastLine(out), x.last) {
				t.Errorf("exit code %d, want %d and %q:\n%s", c.ExitCode(), x.code, x.last, out)
			}
			if _, err := os.Stat(file); err == nil {
				t.Error("the command created a file")
			}
		})
	}
	c := p.Proxy.Command(p.ctx, program("masque-proxy"), "capture", "-o",
		filepath.Join(t.TempDir(), "none", "x.pcap"))
	if out, _ := c.CombinedOutput(); c.ExitCode() == 0 ||
		!strings.Contains(lastLine(out), "no such file or directory") {
		t.Errorf("into no folder: %d, %s", c.ExitCode(), out)
	}
}
