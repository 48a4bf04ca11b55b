package proxy

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"

	"masquevpn/internal/logtest"
	"masquevpn/proxy/internal/auththrottle"
)

// TestGuessing checks that a guesser waits for each answer, one guess per
// connection, and that a client with valid credentials from the same address
// does not wait. The log has the failure without the secret.
func TestGuessing(t *testing.T) {
	var out logtest.Buffer
	users := &oneChanging{alice: User{Name: "alice"}}
	s := startServer(t, withUsers(users, func(c *Config) {
		c.Logger = slog.New(slog.NewJSONHandler(&out, nil))
	}))
	_, h3 := s.dial(t, nil)
	guess := http.Header{"Authorization": {"Bearer s3cret"}}
	for range auththrottle.Burst + 3 {
		if _, ok := s.auth.throttle.Begin("127.0.0.1/32"); !ok {
			t.Fatal("too many answers wait")
		}
		s.auth.throttle.End()
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
		t.Errorf("with valid credentials: status %d, want 200", rsp.StatusCode)
	}
	select {
	case status := <-slow:
		t.Errorf("a guess was answered before that, with status %d", status)
	default:
	}
	if n := s.Status().AuthFailures["token"]; n != 1 {
		t.Errorf("%d guesses of one connection were checked, want 1", n)
	}
	if got := <-slow; got != 401 {
		t.Errorf("the guess was answered with status %d, want 401", got)
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
