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

// listen takes the part of systemd. The returned function reads the next
// notification.
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
	s.Status("2 sessions") // sends nothing, because the text is the same
	s.Status("a\nREADY=1")
	s.Alive()
	s.Reloading()
	s.Waiting("no certificate yet")
	s.Stopping()
	for _, want := range []string{"READY=1", "STATUS=2 sessions", "STATUS=a READY=1", "WATCHDOG=1",
		"RELOADING=1\nMONOTONIC_USEC=", "STATUS=no certificate yet", "EXTEND_TIMEOUT_USEC=30000000",
		"STOPPING=1"} {
		if got := next(); got != want &&
			!(strings.HasSuffix(want, "USEC=") && strings.HasPrefix(got, want)) {
			t.Errorf("notification %q, want %q", got, want)
		}
	}
}

// TestHealth checks that an unhealthy Service sends no keep-alive
// notifications, shows the reason and logs it once.
func TestHealth(t *testing.T) {
	next := listen(t)
	t.Setenv("WATCHDOG_USEC", "30000000")
	t.Setenv("WATCHDOG_PID", "")
	var logs bytes.Buffer
	s := NewService(slog.New(slog.NewTextHandler(&logs, nil)))
	s.Health(nil)
	for range 3 {
		s.Health(errors.New("packets are stuck"))
	}
	s.Stopping()
	for _, want := range []string{"WATCHDOG=1", "STATUS=packets are stuck", "STOPPING=1"} {
		if got := next(); got != want {
			t.Errorf("notification %q, want %q", got, want)
		}
	}
	if n := strings.Count(logs.String(), "packets are stuck"); n != 1 {
		t.Errorf("logged %d times, want once:\n%s", n, &logs)
	}
}

func TestWithoutWatchdog(t *testing.T) {
	next := listen(t)
	t.Setenv("WATCHDOG_USEC", "")
	s := NewService(slog.New(slog.DiscardHandler))
	s.Alive()
	s.Stopping()
	if got := next(); got != "STOPPING=1" {
		t.Errorf("notification %q, want STOPPING=1", got)
	}
}

func TestWithoutSystemd(t *testing.T) {
	for _, tt := range []struct {
		name   string
		socket string
		lines  int // logged
	}{
		{"no socket", "", 0},
		{"socket without systemd", filepath.Join(t.TempDir(), "none"), 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("NOTIFY_SOCKET", tt.socket)
			var logs bytes.Buffer
			s := NewService(slog.New(slog.NewTextHandler(&logs, nil)))
			s.Ready()
			s.Stopping()
			if n := strings.Count(logs.String(), "\n"); n != tt.lines {
				t.Errorf("logged %d lines, want %d:\n%s", n, tt.lines, &logs)
			}
		})
	}
}

// TestUDPSockets starts this test again with sockets, as systemd starts a
// service.
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
	unixgram, err := net.ListenPacket("unixgram", filepath.Join(dir, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer unixgram.Close()
	for _, tt := range []struct {
		test   string
		socket interface{ File() (*os.File, error) }
		name   string // FileDescriptorName=
		want   string
	}{
		{"UDP", udp.(*net.UDPConn), "quic", "socket: " + udp.LocalAddr().String()},
		{"other name", udp.(*net.UDPConn), "metrics",
			`error: the socket "metrics" has an unknown name: use FileDescriptorName=quic`},
		{"TCP", tcp.(*net.TCPListener), "quic", `error: the socket "quic"`},
		{"unix", unixgram.(*net.UnixConn), "quic", `error: the socket "quic" is not a UDP socket`},
	} {
		t.Run(tt.test, func(t *testing.T) {
			f, err := tt.socket.File()
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(os.Args[0], "-test.run=^TestUDPSockets$")
			cmd.ExtraFiles = []*os.File{f}
			cmd.Env = append(os.Environ(), "SYSTEMD_TEST_NAME="+tt.name, "LISTEN_FDS=1",
				"LISTEN_FDNAMES="+tt.name)
			out, err := cmd.CombinedOutput()
			f.Close()
			if line, _, _ := strings.Cut(string(out), "\n"); err != nil ||
				!strings.HasPrefix(line, tt.want) {
				t.Errorf("%v\n%s, want %s", err, out, tt.want)
			}
		})
	}
	if sockets, err := UDPSockets("quic"); len(sockets) > 0 || err != nil {
		t.Errorf("without systemd: %v, %v", sockets, err)
	}
}

func TestIsService(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	if IsService() {
		t.Error("IsService() = true without NOTIFY_SOCKET")
	}
	t.Setenv("NOTIFY_SOCKET", "/run/systemd/notify")
	if !IsService() {
		t.Error("IsService() = false with NOTIFY_SOCKET")
	}
}
