package test

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"masquevpn/internal/lab"
)

// scraper requests the metrics of a program on a host.
type scraper struct {
	p    *pair
	host *lab.Host
	http *http.Client
}

// newScraper returns a scraper of the program that serves metrics on host.
func newScraper(p *pair, host *lab.Host) *scraper {
	s := &scraper{p: p, host: host, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return host.DialContext(ctx, network, addr)
		},
	}}}
	p.t.Cleanup(s.http.CloseIdleConnections)
	return s
}

// get requests a path. The status is 0 if nothing answers.
func (s *scraper) get(path string) (status int, body string) {
	s.p.t.Helper()
	ctx, cancel := context.WithTimeout(s.p.ctx, patience)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:9484"+path, nil)
	check(s.p.t, err)
	answer, err := s.http.Do(r)
	if err != nil {
		return 0, err.Error()
	}
	defer answer.Body.Close()
	b, err := io.ReadAll(answer.Body)
	check(s.p.t, err)
	return answer.StatusCode, string(b)
}

// scrape returns all samples by name and labels, in the format of Prometheus.
func (s *scraper) scrape() map[string]float64 {
	s.p.t.Helper()
	status, body := s.get("/metrics")
	if status != http.StatusOK {
		s.p.t.Fatalf("GET /metrics: %d %s", status, body)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(body))
	check(s.p.t, err)
	samples := make(map[string]float64)
	for name, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			key := name
			if len(labels) > 0 {
				key += "{" + strings.Join(labels, ",") + "}"
			}
			switch f.GetType() {
			case dto.MetricType_COUNTER:
				samples[key] = m.GetCounter().GetValue()
			case dto.MetricType_GAUGE:
				samples[key] = m.GetGauge().GetValue()
			}
		}
	}
	return samples
}

// await waits until a sample has a value.
func (s *scraper) await(sample string, value float64) {
	s.p.t.Helper()
	s.p.eventually(fmt.Sprintf("%s is %v", sample, value), func() bool {
		got, ok := s.scrape()[sample]
		return ok && got == value
	})
}

// The metrics of both ends count a session, and the metrics of the proxy agree
// with its status.
func TestMetrics(t *testing.T) {
	p := newPair(t, options{client: "\n[metrics]\nlisten = \"127.0.0.1:9484\"\n"})
	at := newScraper(p, p.Proxy)
	if status, body := at.get("/readyz"); status != 200 || body != "ok\n" {
		t.Errorf("GET /readyz: %d %q", status, body)
	}
	before := at.scrape()
	for _, sample := range []string{
		"masque_sessions", `masque_auth_failures_total{method="token"}`,
		`masque_session_requests_total{reason="accepted",status="200"}`,
		`masque_packets_total{direction="rx"}`,
		`masque_capsules_total{direction="tx",type="address_assign"}`,
	} {
		if v, ok := before[sample]; !ok || v != 0 {
			t.Errorf("%s is %v, %v at the start", sample, v, ok)
		}
	}

	alice := p.invite("alice")
	p.up(p.Client, alice)
	p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
	// An address of the pool that no session has.
	_, _ = p.Target.Command(p.ctx, "ping", "-c", "2", "-i", "0.2", "-W", "1",
		"10.77.0.77").CombinedOutput()
	text, err := os.ReadFile(alice)
	check(t, err)
	guess := filepath.Join(t.TempDir(), "guess.toml")
	head, _, _ := strings.Cut(string(text), "cert_pem")
	check(t, os.WriteFile(guess, []byte(head+"\n[auth]\ntoken = \"guess\"\n"), 0o600))
	if out, _ := p.Client.Command(p.ctx, program("masque-client"), "forward-udp", "5353",
		"192.0.2.53:53", "-c", guess).CombinedOutput(); !strings.Contains(string(out),
		"credentials") {
		t.Errorf("a wrong token: %s", out)
	}

	at.await("masque_sessions", 1)
	at.await(`masque_auth_failures_total{method="token"}`, 1)
	at.await(`masque_session_requests_total{reason="credentials",status="401"}`, 1)
	at.await(`masque_session_requests_total{reason="accepted",status="200"}`, 1)
	at.await(`masque_dropped_packets_total{direction="tx",reason="no_session"}`, 2)
	at.await(`masque_icmp_sent_total{type="no_session"}`, 2)
	at.await(`masque_capsules_total{direction="rx",type="address_request"}`, 1)
	at.await(`masque_pool_addresses{family="ipv4",state="leased"}`, 1)
	at.await(`masque_pool_addresses{family="ipv4",state="free"}`, 252)
	at.await(`masque_sessions_limit`, 4096)
	now := at.scrape()
	for _, sample := range []string{
		`masque_packets_total{direction="rx"}`, `masque_bytes_total{direction="tx"}`,
		`masque_capsules_total{direction="tx",type="address_assign"}`,
		`masque_capsules_total{direction="tx",type="route_advertisement"}`,
		"masque_certificate_expiry_timestamp_seconds", "process_resident_memory_bytes",
	} {
		if now[sample] <= 0 {
			t.Errorf("%s is %v", sample, now[sample])
		}
	}
	for sample := range now {
		if strings.Contains(sample, "alice") || strings.Contains(sample, "user=") {
			t.Errorf("%s is about a user", sample)
		}
	}

	client := newScraper(p, p.Client)
	client.await("masque_sessions", 1)
	c := client.scrape()
	for _, sample := range []string{
		"masque_rtt_seconds", "masque_mtu_bytes", "masque_certificate_expiry_timestamp_seconds",
		`masque_packets_total{direction="tx"}`,
		`masque_capsules_total{direction="rx",type="address_assign"}`,
	} {
		if c[sample] <= 0 {
			t.Errorf("the client's %s is %v", sample, c[sample])
		}
	}
	if _, ok := c["masque_sessions_limit"]; ok ||
		c[`masque_reconnects_total{reason="closed"}`] != 0 {
		t.Errorf("the client has metrics of a proxy, or reconnects: %v", c)
	}

	// The metrics agree with the status once no packets pass.
	p.down(p.Client, "alice")
	at.await("masque_sessions", 0)
	at.await(`masque_pool_addresses{family="ipv4",state="leased"}`, 0)
	p.eventually("metrics and status agree", func() bool {
		s := p.proxyStatus()
		want := map[string]float64{
			"masque_sessions": float64(s.Sessions), "packets rx": float64(s.Packets.RX),
			"packets tx": float64(s.Packets.TX),
			"bytes rx":   float64(s.Bytes.RX), "bytes tx": float64(s.Bytes.TX),
			"icmp": float64(s.ICMPSent),
		}
		for reason, n := range s.Drops {
			if n > 0 { // the status also lists reasons without packets
				want["dropped "+reason] = float64(n)
			}
		}
		for status, n := range s.Requests {
			want["requests "+status] = float64(n)
		}
		for method, n := range s.AuthFailures {
			want["refused "+method] = float64(n)
		}
		got := make(map[string]float64)
		for sample, v := range at.scrape() {
			label := func(name string) string {
				_, rest, _ := strings.Cut(sample, name+`="`)
				value, _, _ := strings.Cut(rest, `"`)
				return value
			}
			name, _, _ := strings.Cut(sample, "{")
			switch {
			case name == "masque_sessions":
				got[name] = v
			case v == 0 && name != "masque_auth_failures_total" && name != "masque_packets_total" &&
				name != "masque_bytes_total" && name != "masque_icmp_sent_total":
			case name == "masque_packets_total":
				got["packets "+label("direction")] = v
			case name == "masque_bytes_total":
				got["bytes "+label("direction")] = v
			case name == "masque_icmp_sent_total":
				got["icmp"] += v
			case name == "masque_dropped_packets_total":
				got["dropped "+label("reason")] += v
			case name == "masque_session_requests_total":
				got["requests "+label("status")] += v
			case name == "masque_auth_failures_total":
				got["refused "+label("method")] = v
			}
		}
		if maps.Equal(got, want) {
			return true
		}
		t.Logf("metrics %v, status %v", got, want)
		return false
	})
	if now := at.scrape(); now[`masque_packets_total{direction="rx"}`] < 2 {
		t.Errorf("the packets of the ended session are not counted: %v", now)
	}
	p.stopProxy()
	if status, _ := at.get("/healthz"); status != 0 {
		t.Errorf("GET /healthz after the end: %d", status)
	}
}

// If the port of the metrics is in use, the proxy starts without metrics. If
// the configuration names the port, the proxy does not start.
func TestMetricsPortTaken(t *testing.T) {
	p := newPair(t, options{})
	p.stopProxy()
	ln, err := p.Proxy.Listen("tcp", "127.0.0.1:9484")
	check(t, err)
	defer ln.Close()
	p.startProxy()
	if log := p.log(p.server); !strings.Contains(log, "metrics are not served") ||
		!strings.Contains(log, "metrics.listen: TCP 127.0.0.1:9484 is in use") {
		t.Errorf("the log does not report the missing metrics:\n%s", log)
	}
	p.stopProxy()
	run := func(command string) (code int, out string) {
		c := p.Proxy.Command(p.ctx, program("masque-proxy"), command, "-c", p.config())
		b, _ := c.CombinedOutput()
		return c.ExitCode(), string(b)
	}
	const taken = "metrics.listen: TCP 127.0.0.1:9484 is in use"
	if code, out := run("check"); code != 0 || !strings.Contains(out, "warn  "+taken) {
		t.Errorf("check: %d\n%s", code, out)
	}
	appendTo(t, p.config(), "\n[metrics]\nlisten = \"127.0.0.1:9484\"\n")
	if code, out := run("check"); code != 2 || !strings.Contains(out, "fail  "+taken) {
		t.Errorf("check: %d\n%s", code, out)
	}
	if code, out := run("run"); code != 1 ||
		!strings.Contains(lastLine([]byte(out)),
			taken+": stop what uses it (ss -tlpn), or change metrics.listen") {
		t.Errorf("run: %d\n%s", code, out)
	}
	p.editProxyConfig(`listen = "127.0.0.1:9484"`, `listen = ""`)
	p.startProxy()
	if log := p.log(p.server); strings.Contains(log, "metrics") {
		t.Errorf("the log of a proxy without metrics mentions them:\n%s", log)
	}
	p.editProxyConfig(`listen = ""`, `listen = "[::1]:9484"`)
	if out := p.must(p.Proxy, "masque-proxy",
		"reload"); strings.TrimSpace(out) != "reloaded; restart the proxy for: metrics.listen" {
		t.Errorf("reload printed %q", out)
	}
}
