package metrics

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"masquevpn/internal/connectip"
	"masquevpn/internal/ippacket"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// full has a value in every field.
func full() Values {
	v := Values{
		Stats: &connectip.Stats{}, Sessions: 3, MaxSessions: 9, UDPFlows: 2, MaxUDPFlows: 8,
		Requests:     []Request{{200, "accepted", 5}, {403, "destination_ip_prohibited", 1}},
		AuthFailures: map[string]uint64{"token": 2},

		PendingConnections: 4, ConnectionsEnded: map[string]uint64{"no_request": 6},

		Pool:       []Pool{{"ipv4", 2, 250}},
		Reconnects: map[string]uint64{"timeout": 4},

		PeerPairs:         map[string]int{"pin": 2},
		PeerStates:        map[string]int{"idle": 3},
		PeerRequests:      map[int]uint64{200: 5},
		PeerRevocations:   map[string]uint64{"expired": 1},
		PeerVerifications: []PeerVerification{{"none", "not_delegated", 4}},
		Discoveries:       []Discovery{{"well-known/srv", "ok", 3}, {"none", "dns_failure", 1}},
		WellKnownRequests: map[string]uint64{"valid": 5},

		Repairs: map[string]uint64{"rule": 2},
		RTT:     1500 * time.Microsecond, MTU: 1400,
		CertificateExpiry: time.Unix(1700000000, 0),
	}
	v.Panics = 6
	v.Oldest.Note(connectip.StageInbox, 3*time.Second)
	v.Stats.Receive.Add(100)
	v.Stats.Send.Add(200)
	v.Stats.Send.Drop(connectip.DropTooBig)
	v.Stats.ICMPSent.Count(ippacket.TooBig)
	v.Stats.ICMPSuppressed.Add(7)
	return v
}

// The names, types, units and texts follow Prometheus' rules, and the labels
// are the documented ones.
func TestMetrics(t *testing.T) {
	c := collector{Program{"masque-proxy", "v1", "abc", "go1"}, full}
	problems, err := testutil.CollectAndLint(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(c)
	got, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != len(all) {
		t.Errorf("%d metrics have values, %d are described", len(got), len(all))
	}
	var text strings.Builder
	for _, f := range got {
		for _, m := range f.GetMetric() {
			text.WriteString(f.GetName())
			for _, l := range m.GetLabel() {
				text.WriteString(" " + l.GetName() + "=" + l.GetValue())
			}
			value := m.GetGauge().GetValue() + m.GetCounter().GetValue()
			text.WriteString(" " + time.Duration(value*float64(time.Second)).String() + "\n")
		}
	}
	for _, want := range []string{
		"masque_build_info goversion=go1 program=masque-proxy revision=abc version=v1 1s",
		"masque_sessions 3s", "masque_sessions_limit 9s", "masque_udp_flows 2s",
		"masque_udp_flows_limit 8s",
		"masque_session_requests_total reason=accepted status=200 5s",
		"masque_session_requests_total reason=destination_ip_prohibited status=403 1s",
		"masque_auth_failures_total method=token 2s",
		"masque_pending_connections 4s", "masque_connections_ended_total reason=no_request 6s",
		"masque_packets_total direction=rx 1s", "masque_bytes_total direction=tx 3m20s",
		"masque_dropped_packets_total direction=tx reason=too_big 1s",
		"masque_dropped_packets_total direction=rx reason=too_big 0s",
		"masque_icmp_sent_total type=too_big 1s", "masque_icmp_sent_total type=no_route 0s",
		"masque_icmp_suppressed_total 7s",
		"masque_capsules_total direction=rx type=address_assign 0s",
		"masque_capsules_total direction=tx type=unknown 0s",
		"masque_pool_addresses family=ipv4 state=leased 2s",
		"masque_pool_addresses family=ipv4 state=free 4m10s",
		"masque_kernel_repairs_total what=rule 2s",
		"masque_oldest_packet_seconds stage=inbox 3s",
		"masque_oldest_packet_seconds stage=sender 0s", "masque_panics_total 6s",
		"masque_peer_pairs identity=pin 2s", "masque_peers state=idle 3s",
		"masque_peer_requests_total status=200 5s",
		"masque_peer_revocations_total reason=expired 1s",
		"masque_peer_verifications_total identity=none result=not_delegated 4s",
		"masque_discoveries_total result=ok step=well-known/srv 3s",
		"masque_discoveries_total result=dns_failure step=none 1s",
		"masque_well_known_requests_total result=valid 5s",
		"masque_reconnects_total reason=timeout 4s", "masque_rtt_seconds 1.5ms",
		"masque_mtu_bytes 23m20s",
		"masque_certificate_expiry_timestamp_seconds 472222h13m20s",
	} {
		if !strings.Contains("\n"+text.String(), "\n"+want+"\n") {
			t.Errorf("missing %s", want)
		}
	}
	if t.Failed() {
		t.Log(text.String())
	}
	// The number of series is bounded, and no label identifies a user.
	for _, f := range got {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if slices.Contains([]string{"user", "remote", "address", "session"}, l.GetName()) {
					t.Errorf("%s has the label %s", f.GetName(), l.GetName())
				}
			}
		}
	}
}

// A program has only its own metrics.
func TestMetricsOfOneProgram(t *testing.T) {
	c := collector{values: func() Values { return Values{Stats: &connectip.Stats{}} }}
	for _, name := range []string{
		"masque_sessions_limit", "masque_udp_flows", "masque_udp_flows_limit",
		"masque_session_requests_total", "masque_auth_failures_total", "masque_pool_addresses",
		"masque_pending_connections", "masque_connections_ended_total",
		"masque_reconnects_total", "masque_rtt_seconds", "masque_mtu_bytes",
		"masque_certificate_expiry_timestamp_seconds",
	} {
		if n := testutil.CollectAndCount(c, name); n != 0 {
			t.Errorf("%s has %d values", name, n)
		}
	}
	if n := testutil.CollectAndCount(c, "masque_sessions"); n != 1 {
		t.Errorf("masque_sessions has %d values", n)
	}
}

// The dashboard and the alerts name only existing metrics.
func TestFilesNameMetrics(t *testing.T) {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collector{values: full}, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	known := make(map[string]bool)
	for _, f := range families {
		known[f.GetName()] = true
	}
	name := regexp.MustCompile(`\b(masque|process|go)_[a-z0-9_]+\b`)
	used := make(map[string]bool)
	for _, file := range []string{"../../packaging/grafana/masque.json",
		"../../packaging/prometheus/masque.rules.yml"} {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		found := name.FindAllString(string(data), -1)
		if len(found) == 0 {
			t.Errorf("%s names no metric", file)
		}
		for _, n := range found {
			used[n] = true
			if !known[n] {
				t.Errorf("%s: there is no metric %s", file, n)
			}
		}
	}
	for n := range known {
		if strings.HasPrefix(n, "masque_") && !used[n] {
			t.Errorf("neither the dashboard nor an alert uses %s", n)
		}
	}
}

// served is a server on a port of its own.
type served struct {
	t    *testing.T
	addr string
	mu   sync.Mutex
	ill  error         // error of Well
	why  error         // error of Ready
	hang chan struct{} // blocks Values until closed; nil: Values returns at once
}

func serve(t *testing.T) *served {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &served{t: t, addr: ln.Addr().String()}
	server := Serve(ln, Config{
		Logger: slog.New(slog.DiscardHandler),
		Values: func() Values {
			s.mu.Lock()
			hang := s.hang
			s.mu.Unlock()
			if hang != nil {
				<-hang
			}
			return full()
		},
		Well: func() error {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.ill
		},
		Ready: func() error {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.why
		},
	})
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		http.DefaultClient.CloseIdleConnections()
	})
	return s
}

func (s *served) do(method, path string) (status int, body string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 30*time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, "http://"+s.addr+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		s.t.Fatal(err)
	}
	defer answer.Body.Close()
	b, err := io.ReadAll(answer.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return answer.StatusCode, string(b)
}

func (s *served) wants(path string, status int, text string) {
	s.t.Helper()
	if got, body := s.do("GET", path); got != status || !strings.Contains(body, text) {
		s.t.Errorf("GET %s: %d %.200q, want %d and %q", path, got, body, status, text)
	}
}

func TestServer(t *testing.T) {
	s := serve(t)
	s.wants("/metrics", 200, "\nmasque_sessions 3\n")
	s.wants("/metrics", 200, "\nprocess_open_fds ")
	s.wants("/healthz", 200, "ok\n")
	s.wants("/readyz", 200, "ok\n")
	s.mu.Lock()
	s.why = errors.New("the proxy is stopping")
	s.mu.Unlock()
	s.wants("/readyz", 503, "the proxy is stopping\n")
	s.wants("/healthz", 200, "ok\n")
	s.mu.Lock()
	s.ill = errors.New("packets are stuck")
	s.mu.Unlock()
	s.wants("/healthz", 503, "packets are stuck\n")
	s.wants("/readyz", 503, "packets are stuck\n")
	for _, path := range []string{"/", "/debug/pprof/", "/metrics/x"} {
		s.wants(path, 404, "")
	}
	for _, method := range []string{"POST", "PUT", "DELETE", "OPTIONS"} {
		for _, path := range []string{"/metrics", "/healthz", "/readyz"} {
			if status, _ := s.do(method, path); status != 405 {
				t.Errorf("%s %s: %d", method, path, status)
			}
		}
	}
}

// A program that hangs is neither healthy nor ready. Repeated requests start no
// further goroutines.
func TestHanging(t *testing.T) {
	s := serve(t)
	hang := make(chan struct{})
	s.mu.Lock()
	s.hang = hang
	s.mu.Unlock()
	var asked sync.WaitGroup
	for _, path := range []string{"/healthz", "/readyz", "/healthz", "/readyz"} {
		asked.Go(func() { s.wants(path, 503, "hangs") })
	}
	asked.Wait()
	s.mu.Lock()
	s.hang = nil
	s.mu.Unlock()
	close(hang)
	s.wants("/healthz", 200, "ok\n")
	s.wants("/readyz", 200, "ok\n")
}

// An endless header ends the request.
func TestSlowHeader(t *testing.T) {
	s := serve(t)
	c, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: a\r\nX: "+
		strings.Repeat("x", 1<<20)); err == nil {
		answer, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err == nil && answer.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("status %d", answer.StatusCode)
		}
	}
	s.wants("/healthz", 200, "ok\n")
}
