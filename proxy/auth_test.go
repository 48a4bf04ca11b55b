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
