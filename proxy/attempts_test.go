package proxy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"masquevpn/internal/logtest"
)

func TestAttempts(t *testing.T) {
	now := time.Now()
	a := attempts{now: func() time.Time { return now }}
	remote := func(s string) net.Addr { return &net.UDPAddr{IP: net.ParseIP(s), Port: 9} }
	begin := func(addr, user string, want time.Duration) {
		t.Helper()
		got, ok := a.begin(remote(addr), user)
		if !ok || got != want {
			t.Errorf("a failure of %s waits %v, %v, want %v", addr, got, ok, want)
		}
		a.end()
	}
	for range failureBurst {
		begin("192.0.2.1", "", 0)
	}
	for i := range 3 {
		begin("192.0.2.1", "", time.Duration(i+1)*time.Second)
	}
	begin("192.0.2.2", "", 0)
	for range 100 {
		_, _ = a.begin(remote("192.0.2.1"), "")
		a.end()
	}
	begin("192.0.2.1", "", maxFailureDelay)
	now = now.Add(10 * time.Second) // which pays for that and more
	begin("192.0.2.1", "", 0)
	now = now.Add(3 * forgetSources)
	begin("192.0.2.1", "", 0)

	// Of IPv6, a client has a network. What is about one user counts wherever
	// it comes from.
	for i := range failureBurst {
		begin(fmt.Sprintf("2001:db8::%x", i), "", 0)
		begin(fmt.Sprintf("192.0.2.%d", 100+i), "alice", 0)
	}
	begin("2001:db8::ffff", "", time.Second)
	begin("2001:db8:0:1::1", "", 0)
	begin("192.0.2.99", "alice", time.Second)
	begin("192.0.2.99", "bob", 0)

	// What is remembered is bounded, and so is what waits.
	for i := range 5 * maxSources {
		begin(fmt.Sprintf("10.%d.%d.1", i>>8, i&0xff), "", 0)
	}
	if n := len(a.recent) + len(a.older); n > 2*maxSources {
		t.Errorf("%d sources are remembered", n)
	}
	for range maxWaitingFailures {
		if _, ok := a.begin(remote("192.0.2.1"), ""); !ok {
			t.Fatal("too few may wait")
		}
	}
	if _, ok := a.begin(remote("192.0.2.2"), ""); ok {
		t.Error("too many wait")
	}
}

// Who guesses waits for the answer, and for the next guess on the same
// connection. Who has good credentials does not, behind the same address. The
// log has all that an operator needs and no secret.
func TestGuessing(t *testing.T) {
	var out logtest.Buffer
	users := &oneChanging{alice: User{Name: "alice"}}
	s := startServer(t, withUsers(users, func(c *Config) {
		c.Logger = slog.New(slog.NewJSONHandler(&out, nil))
	}))
	_, h3 := s.dial(t, nil)
	guess := http.Header{"Authorization": {"Bearer s3cret"}}
	for range failureBurst + 3 {
		s.attempts.mu.Lock()
		s.attempts.delay("127.0.0.1/32", time.Now())
		s.attempts.mu.Unlock()
	}
	slow := make(chan int, 2)
	for range 2 {
		str := send(t, h3, "CONNECT", "connect-ip", anyPath, guess)
		go func() {
			rsp, err := str.ReadResponse()
			if err != nil {
				slow <- 0
				return
			}
			slow <- rsp.StatusCode
		}()
	}
	for strings.Count(out.String(), "authentication failed") == 0 {
		time.Sleep(time.Millisecond)
	}
	_, other := s.dial(t, nil)
	if rsp, _ := request(t, other, "CONNECT", "connect-ip", anyPath,
		asAlice); rsp.StatusCode != 200 {
		t.Errorf("with good credentials: status %d", rsp.StatusCode)
	}
	select {
	case status := <-slow:
		t.Errorf("a guess was answered with %d before that", status)
	default:
	}
	if n := s.Status().AuthFailures["token"]; n != 1 {
		t.Errorf("%d guesses were looked at, want 1 of those on one connection", n)
	}
	if got := <-slow; got != 401 {
		t.Errorf("the guess was answered with %d", got)
	}
	var line struct{ Level, Msg, Remote, Method, Class, User, Reason string }
	for l := range bytes.Lines([]byte(out.String())) {
		if strings.Contains(string(l), "authentication failed") {
			if err := json.Unmarshal(l, &line); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	if line.Level != "WARN" || !strings.HasPrefix(line.Remote, "127.0.0.1:") ||
		line.Method != "token" || line.Class != classWrongToken || line.Reason == "" {
		t.Errorf("the log has %+v", line)
	}
	if strings.Contains(out.String(), "s3cret") {
		t.Errorf("the secret is in the log:\n%s", out.String())
	}
}
