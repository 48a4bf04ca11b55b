package systemd

import (
	"bytes"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// listen stands for systemd: the function reads what it is told next.
func listen(t *testing.T) func() string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return func() string {
		t.Helper()
		buf := make([]byte, 4096)
		n, err := c.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:n])
	}
}

func TestService(t *testing.T) {
	next := listen(t)
	t.Setenv("WATCHDOG_USEC", "30000000")
	t.Setenv("WATCHDOG_PID", "")
	s := NewService(slog.New(slog.DiscardHandler))
	s.Ready()
	s.Status("2 sessions")
	s.Status("2 sessions") // not told again
	s.Status("a\nREADY=1")
	s.Alive()
	s.Reloading()
	s.Waiting("no certificate yet")
	s.Stopping()
	for _, want := range []string{"READY=1", "STATUS=2 sessions", "STATUS=a READY=1", "WATCHDOG=1", "RELOADING=1\nMONOTONIC_USEC=", "STATUS=no certificate yet", "EXTEND_TIMEOUT_USEC=30000000", "STOPPING=1"} {
		if got := next(); got != want && !(strings.HasSuffix(want, "USEC=") && strings.HasPrefix(got, want)) {
			t.Errorf("systemd was told %q, want %q", got, want)
		}
	}
}

// A program that is not well does not feed the watchdog, and says why, in the log once.
func TestHealth(t *testing.T) {
	next := listen(t)
	t.Setenv("WATCHDOG_USEC", "30000000")
	t.Setenv("WATCHDOG_PID", "")
	var log bytes.Buffer
	s := NewService(slog.New(slog.NewTextHandler(&log, nil)))
	s.Health(nil)
	for range 3 {
		s.Health(errors.New("packets are stuck"))
	}
	s.Stopping()
	for _, want := range []string{"WATCHDOG=1", "STATUS=packets are stuck", "STOPPING=1"} {
		if got := next(); got != want {
			t.Errorf("systemd was told %q, want %q", got, want)
		}
	}
	if n := strings.Count(log.String(), "packets are stuck"); n != 1 {
		t.Errorf("%d lines of the log, want 1:\n%s", n, &log)
	}
}

func TestWithoutWatchdog(t *testing.T) {
	next := listen(t)
	t.Setenv("WATCHDOG_USEC", "")
	s := NewService(slog.New(slog.DiscardHandler))
	s.Alive()
	s.Stopping()
	if got := next(); got != "STOPPING=1" {
		t.Errorf("systemd was told %q", got)
	}
}

func TestWithoutSystemd(t *testing.T) {
	for _, test := range []struct {
		socket string
		lines  int // of the log
	}{{"", 0}, {filepath.Join(t.TempDir(), "none"), 1}} {
		t.Setenv("NOTIFY_SOCKET", test.socket)
		var log bytes.Buffer
		s := NewService(slog.New(slog.NewTextHandler(&log, nil)))
		s.Ready()
		s.Stopping()
		if n := strings.Count(log.String(), "\n"); n != test.lines {
			t.Errorf("socket %q: logged\n%s", test.socket, &log)
		}
	}
}

// TestUDPSockets starts this test again as a service would be.
func TestUDPSockets(t *testing.T) {
	if name := os.Getenv("SYSTEMD_TEST_NAME"); name != "" {
		os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
		sockets, err := UDPSockets("quic")
		if err != nil {
			os.Stdout.WriteString("error: " + err.Error() + "\n")
		}
		for _, c := range sockets {
			os.Stdout.WriteString("socket: " + c.LocalAddr().String() + "\n")
		}
		return
	}
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	dir := t.TempDir()
	unix, err := net.ListenPacket("unixgram", filepath.Join(dir, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close()
	for _, test := range []struct {
		socket interface{ File() (*os.File, error) }
		name   string
		want   string
	}{
		{udp.(*net.UDPConn), "quic", "socket: " + udp.LocalAddr().String()},
		{udp.(*net.UDPConn), "metrics", `error: the socket "metrics" is not known: want FileDescriptorName=quic`},
		{tcp.(*net.TCPListener), "quic", `error: the socket "quic"`},
		{unix.(*net.UnixConn), "quic", `error: the socket "quic" is not of UDP`},
	} {
		f, err := test.socket.File()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestUDPSockets$")
		cmd.ExtraFiles = []*os.File{f}
		cmd.Env = append(os.Environ(), "SYSTEMD_TEST_NAME="+test.name, "LISTEN_FDS=1", "LISTEN_FDNAMES="+test.name)
		out, err := cmd.CombinedOutput()
		f.Close()
		if line, _, _ := strings.Cut(string(out), "\n"); err != nil || !strings.HasPrefix(line, test.want) {
			t.Errorf("%s: %v\n%s", test.name, err, out)
		}
	}
	if sockets, err := UDPSockets("quic"); len(sockets) > 0 || err != nil {
		t.Errorf("without systemd: %v, %v", sockets, err)
	}
}

func TestIsService(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	if IsService() {
		t.Error("a process that systemd does not wait for is a service")
	}
	t.Setenv("NOTIFY_SOCKET", "/run/systemd/notify")
	if !IsService() {
		t.Error("a process that systemd waits for is no service")
	}
}
