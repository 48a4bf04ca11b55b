package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestMain also is the process that holds a lock for TestLockOfDeadProcess.
func TestMain(m *testing.M) {
	if dir := os.Getenv("CONTROL_TEST_HOLD"); dir != "" {
		if _, err := Acquire(dir, "home"); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("held")
		_, _ = io.Copy(io.Discard, os.Stdin) // until the test ends
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func serve(t *testing.T, dir, name string, h http.Handler) *Client {
	t.Helper()
	lock, err := Acquire(dir, name)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Serve(dir, name, h, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := lock.Release(); err != nil {
			t.Error(err)
		}
	})
	return NewClient(dir, name)
}

func TestCalls(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		Reply(w, map[string]int{"n": 7})
	})
	posted := 0
	mux.HandleFunc("POST /stop", func(w http.ResponseWriter, _ *http.Request) {
		posted++
		Reply(w, nil)
	})
	mux.HandleFunc("GET /broken", func(w http.ResponseWriter, _ *http.Request) {
		Fail(w, 500, errors.New("it broke"))
	})
	mux.HandleFunc("GET /count", func(w http.ResponseWriter, r *http.Request) {
		n := 0
		Stream(w, r, func(context.Context) (any, bool) { n++; return n, n <= 3 })
	})
	c := serve(t, dir, "home", mux)
	ctx := t.Context()

	var status struct{ N int }
	if err := c.Get(ctx, "/status", &status); err != nil || status.N != 7 {
		t.Errorf("status %+v, %v", status, err)
	}
	if err := c.Post(ctx, "/stop", nil); err != nil || posted != 1 {
		t.Errorf("posted %d, %v", posted, err)
	}
	if err := c.Get(ctx, "/broken", nil); err == nil || err.Error() != "it broke" {
		t.Errorf("got %v", err)
	}
	if err := c.Get(ctx, "/nothing", nil); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("got %v", err)
	}
	var seen []string
	if err := c.Watch(ctx, "/count", func(v json.RawMessage) bool {
		seen = append(seen, string(v))
		return true
	}); err != io.EOF {
		t.Errorf("end of the stream: %v", err)
	}
	if !slices.Equal(seen, []string{"1", "2", "3"}) {
		t.Errorf("received %v", seen)
	}
	if err := c.Watch(ctx, "/count", func(json.RawMessage) bool { return false }); err != nil {
		t.Errorf("stopped watching: %v", err)
	}

	info, err := os.Stat(SocketPath(dir, "home"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket has mode %v, %v", info.Mode(), err)
	}
}

func TestNotRunning(t *testing.T) {
	dir := t.TempDir()
	err := NewClient(dir, "home").Get(t.Context(), "/status", nil)
	if !errors.Is(err, ErrNotRunning) || err.Error() != "home: not running" {
		t.Errorf("without a socket: %v", err)
	}
	stale(t, dir, "home")
	if err := NewClient(dir, "home").Get(t.Context(), "/status", nil); !errors.Is(err,
		ErrNotRunning) {
		t.Errorf("with a stale socket: %v", err)
	}
	names, err := List(dir)
	if err != nil || len(names) != 0 {
		t.Errorf("a stale socket is listed: %v, %v", names, err)
	}
	if names, err := List(filepath.Join(dir, "none")); err != nil || names != nil {
		t.Errorf("missing directory: %v, %v", names, err)
	}
}

// stale makes a socket that no process listens on.
func stale(t *testing.T, dir, name string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: SocketPath(dir, name), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
}

func TestStaleSocketIsReplaced(t *testing.T) {
	dir := t.TempDir()
	stale(t, dir, "home")
	if err := os.WriteFile(lockPath(dir, "home"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c := serve(t, dir, "home", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		Reply(w, 1)
	}))
	if err := c.Get(t.Context(), "/", nil); err != nil {
		t.Error(err)
	}
	if names, err := List(dir); err != nil || !slices.Equal(names, []string{"home"}) {
		t.Errorf("listed %v, %v", names, err)
	}
}

func TestLock(t *testing.T) {
	dir := t.TempDir()
	lock, err := Acquire(dir, "home")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Acquire(dir, "home"); !errors.Is(err, ErrRunning) {
		t.Errorf("a second instance: %v", err)
	}
	if running, err := Running(dir, "home"); err != nil || !running {
		t.Errorf("running: %v, %v", running, err)
	}
	other, err := Acquire(dir, "work")
	if err != nil {
		t.Fatalf("another name: %v", err)
	}
	for _, l := range []*Lock{lock, other} {
		if err := l.Release(); err != nil {
			t.Error(err)
		}
	}
	if running, err := Running(dir, "home"); err != nil || running {
		t.Errorf("running after the release: %v, %v", running, err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	if err := NewClient(dir, "home").WaitGone(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestLockOfDeadProcess(t *testing.T) {
	dir := t.TempDir()
	holder := exec.Command(os.Args[0])
	holder.Env = append(os.Environ(), "CONTROL_TEST_HOLD="+dir)
	if _, err := holder.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 4)
	if _, err := io.ReadFull(out, line); err != nil || string(line) != "held" {
		t.Fatalf("the holder printed %q, %v", line, err)
	}
	if _, err := Acquire(dir, "home"); !errors.Is(err, ErrRunning) {
		t.Errorf("while another process holds it: %v", err)
	}
	if err := holder.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := NewClient(dir, "home").WaitGone(t.Context()); err != nil {
		t.Error(err)
	}
	_ = holder.Wait() // reports the kill
	lock, err := Acquire(dir, "home")
	if err != nil {
		t.Fatalf("after its death: %v", err)
	}
	if err := lock.Release(); err != nil {
		t.Error(err)
	}
}

func TestLockIsNoSymlink(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(dir, "precious")
	if err := os.Symlink(target, lockPath(dir, "home")); err != nil {
		t.Fatal(err)
	}
	if _, err := Acquire(dir, "home"); err == nil {
		t.Error("a symbolic link was followed")
	}
	if _, err := os.Lstat(target); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the link's target was made: %v", err)
	}
}

func TestWaitGoneEnds(t *testing.T) {
	dir := t.TempDir()
	lock, err := Acquire(dir, "home")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := NewClient(dir, "home").WaitGone(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if err := lock.Release(); err != nil {
		t.Error(err)
	}
}

func TestOnlyOwner(t *testing.T) {
	h := onlyOwner(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { Reply(w, 1) }))
	for _, test := range []struct {
		name string
		uid  any
		want int
	}{
		{"root", 0, http.StatusOK},
		{"owner", os.Geteuid(), http.StatusOK},
		{"other user", os.Geteuid() + 12345, http.StatusForbidden},
		{"invalid user", -1, http.StatusForbidden},
		{"no user", nil, http.StatusForbidden},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := httptest.NewRequest("GET", "/", nil)
			r = r.WithContext(context.WithValue(r.Context(), peerKey{}, test.uid))
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if w.Code != test.want {
				t.Errorf("user %v: %d, want %d", test.uid, w.Code, test.want)
			}
		})
	}
}

func TestLongPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 100))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	_, err := Serve(dir, "home", http.NotFoundHandler(), slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("got %v", err)
	}
}
