package doctor

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"masquevpn/internal/fault"
	"masquevpn/internal/files"
	"masquevpn/internal/pki"
)

var now = time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)

// report returns the lines of the findings of f.
func report(t *testing.T, f func(*Report)) ([]string, error) {
	t.Helper()
	var c Report
	f(&c)
	var out bytes.Buffer
	err := c.Finish(&out, false)
	return strings.Split(strings.TrimSpace(out.String()), "\n"), err
}

func TestReport(t *testing.T) {
	checks := func(c *Report) {
		c.OK("all is %s", "well")
		c.Warn("so so", "do better")
		c.Fail("bad\nnews", "sudo mend it")
	}
	lines, err := report(t, checks)
	want := "ok    all is well|warn  so so — do better|fail  bad news — sudo mend it"
	if got := strings.Join(lines, "|"); got != want {
		t.Errorf("got %s", got)
	}
	if e, ok := errors.AsType[*fault.Error](err); !ok || e.Kind != fault.Usage ||
		!strings.HasPrefix(e.Reason, "1 of 3 checks failed") {
		t.Errorf("ends with %v", err)
	}

	var c Report
	checks(&c)
	var out bytes.Buffer
	if err := c.Finish(&out, true); err == nil {
		t.Error("a failed check is no error as JSON")
	}
	var last Finding
	for decoder := json.NewDecoder(&out); decoder.More(); {
		if err := decoder.Decode(&last); err != nil {
			t.Fatal(err)
		}
	}
	if last != (Finding{Verdict: "fail", Text: "bad\nnews", Remedy: "sudo mend it"}) {
		t.Errorf("the last one is %+v", last)
	}
	if _, err := report(t, func(c *Report) { c.Warn("so so", "") }); err != nil {
		t.Errorf("a warning is an error: %v", err)
	}
}

func TestCertificateChecks(t *testing.T) {
	ca, _, err := pki.NewAuthority("CA", now)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := ca.Server("a.example", nil, now)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := pki.ParseCertificates(pair.Cert)
	if err != nil {
		t.Fatal(err)
	}
	key, err := pki.ParseKey(pair.Key)
	if err != nil {
		t.Fatal(err)
	}
	otherPair, err := ca.Server("b.example", nil, now)
	if err != nil {
		t.Fatal(err)
	}
	other, err := pki.ParseKey(otherPair.Key)
	if err != nil {
		t.Fatal(err)
	}
	good := Credential{Label: "tls.cert", Chain: chain, Key: key, Name: "a.example",
		Usage: x509.ExtKeyUsageServerAuth, Renewal: "renew it"}
	change := func(f func(*Credential)) Credential { c := good; f(&c); return c }
	for _, test := range []struct {
		cred Credential
		at   time.Time
		want string
	}{
		{good, now, "ok    tls.cert: valid until 2028-01-02"},
		{change(func(c *Credential) {
			c.Usage, c.Name, c.Key = x509.ExtKeyUsageAny, "", nil
		}), now, "ok    tls.cert: "},
		{change(func(c *Credential) {
			c.Key = other
		}), now, "fail  tls.cert: the key belongs to another certificate — "},
		{change(func(c *Credential) {
			c.Name = "b.example"
		}), now, "fail  tls.cert: not for the name b.example — "},
		{change(func(c *Credential) {
			c.Usage = x509.ExtKeyUsageClientAuth
		}), now, "fail  tls.cert: not valid for this use — "},
		{good, now.Add(-24 * time.Hour),
			"fail  tls.cert: valid only from 2026-01-02T14:04:05Z, and it is 2026-01-01T15:04:05Z here — check this host's clock"},
		{good, now.Add(pki.ServerValidity + time.Hour),
			"fail  tls.cert: ended on 2028-01-02T15:04:05Z, and it is 2028-01-02T16:04:05Z here — renew it; or check this host's clock"},
		{good, now.Add(pki.ServerValidity - 24*time.Hour),
			"warn  tls.cert: ends on 2028-01-02 — renew it"},
	} {
		t.Run(test.want, func(t *testing.T) {
			// the verdict is part of the line
			lines, _ := report(t, func(c *Report) { c.Certificate(test.cred, test.at) })
			if len(lines) != 1 || !strings.HasPrefix(lines[0], test.want) {
				t.Errorf("got %q, want %q", lines, test.want)
			}
		})
	}
}

func TestConfigChecks(t *testing.T) {
	two := fault.List{
		{Kind: fault.Usage, File: "f", Line: 1, Key: "a", Reason: "bad", Remedy: "mend it"},
		{Kind: fault.Usage, File: "f", Line: 2, Key: "b", Reason: "worse"},
	}
	for _, test := range []struct {
		err  error
		want string
	}{
		{nil, "ok    configuration: f"},
		{two, "fail  configuration: f:1: a: bad — mend it|fail  configuration: f:2: b: worse"},
		{files.Exposed("f"), "fail  configuration: f holds a secret and can be read by others: chmod 600 f"},
	} {
		t.Run(test.want, func(t *testing.T) {
			good := false
			lines, _ := report(t, func(c *Report) { good = c.Config("f", test.err) })
			if got := strings.Join(lines, "|"); got != test.want || good != (test.err == nil) {
				t.Errorf("%v: %v, %s", test.err, good, got)
			}
		})
	}
}

func TestHostChecks(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		check func(*Report)
		want  string
	}{
		{func(c *Report) { c.Interface("lo") }, "fail  interface: lo exists already — "},
		{func(c *Report) { c.Interface("masque-none") }, "ok    interface: masque-none is free"},
		{func(c *Report) { c.Interface("masque%d") }, ""},
		{func(c *Report) { c.RunDir(dir) }, "ok    run directory: "},
		{func(c *Report) { c.RunDir(filepath.Join(dir, "a", "b")) }, "ok    run directory: "},
		{func(c *Report) { c.RunDir(filepath.Join(file, "a")) }, "fail  run directory: "},
	} {
		t.Run(test.want, func(t *testing.T) {
			lines, _ := report(t, test.check)
			if !strings.HasPrefix(lines[0], test.want) {
				t.Errorf("got %q, want %q", lines, test.want)
			}
		})
	}
	// These depend on the machine. Each has one finding.
	for _, check := range []func(*Report){
		func(c *Report) { c.NetAdmin("cap_net_admin") }, func(c *Report) {
			c.TUN(true)
		}, func(c *Report) {
			c.UDPBuffer()
		}, func(c *Report) {
			c.NFTables("nat", "")
		}, func(c *Report) {
			c.UDPOffload()
		}, func(c *Report) { c.PolicyRouting() }, func(c *Report) { c.IPv6(true) },
		func(c *Report) { c.ReversePath() }, func(c *Report) { c.Clock(time.Now()) },
	} {
		if lines, _ := report(t, check); len(lines) != 1 || lines[0] == "" {
			t.Errorf("got %q", lines)
		}
	}
}

// tree creates files in a new folder.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		name = filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestFindings(t *testing.T) {
	no := errors.New("no such thing")
	none := t.TempDir()
	disabled := func(v string) string {
		return tree(t, map[string]string{"net/ipv6/conf/default/disable_ipv6": v})
	}
	filter := func(all, up0 string) string {
		return tree(t, map[string]string{"net/ipv4/conf/all/rp_filter": all,
			"net/ipv4/conf/up0/rp_filter": up0, "net/ipv4/conf/default/rp_filter": "1"})
	}
	forward := func(v string) string { return tree(t, map[string]string{"net/ipv4/ip_forward": v}) }
	dir := t.TempDir()
	for _, test := range []struct {
		check func(*Report)
		want  string
	}{
		{func(c *Report) { c.clock(now, 0, nil) }, "ok    clock: synchronised"},
		{func(c *Report) {
			c.clock(now, 0x40, nil)
		}, "warn  clock: not known to be synchronised; it is 2026-01-02 15:04:05 UTC here — certificates fail when it is wrong: sudo timedatectl"},
		{func(c *Report) {
			c.clock(now, 0, no)
		}, "warn  clock: synchronisation is not known: no such thing"},
		{func(c *Report) {
			c.clock(time.Unix(0, 0), 0, nil)
		}, "fail  clock: it is 1970-01-01 00:00:00 UTC here, and no certificate is valid then — set it: sudo timedatectl"},

		{func(c *Report) { c.ipv6(disabled("0"), true) }, "ok    IPv6: on for new interfaces"},
		{func(c *Report) {
			c.ipv6(disabled("1"), true)
		}, "fail  IPv6: net.ipv6.conf.default.disable_ipv6 is 1, and [pool] has IPv6 addresses — sudo sysctl -w net.ipv6.conf.default.disable_ipv6=0, or take ipv6 out of [pool]"},
		{func(c *Report) {
			c.ipv6(disabled("1"), false)
		}, "warn  IPv6: net.ipv6.conf.default.disable_ipv6 is 1: the tunnel will be for IPv4 only — sudo sysctl -w net.ipv6.conf.default.disable_ipv6=0"},
		{func(c *Report) {
			c.ipv6(none, true)
		}, "fail  IPv6: the kernel has none, and [pool] has IPv6 addresses — "},

		{func(c *Report) {
			c.reversePath(filter("0", "0"), nil)
		}, "ok    reverse path filter: not strict"},
		{func(c *Report) {
			c.reversePath(filter("2", "1"), no)
		}, "ok    reverse path filter: not strict"},
		{func(c *Report) {
			c.reversePath(filter("0", "1"), nil)
		}, "ok    reverse path filter: strict on up0; the client marks"},
		{func(c *Report) {
			c.reversePath(filter("0", "1"), no)
		}, "warn  reverse path filter: strict on up0, which drops what the proxy sends"},
		{func(c *Report) {
			c.reversePath(filter("1", "0"), no)
		}, "warn  reverse path filter: strict on all, "},

		{func(c *Report) {
			c.forwarding(forward("1"), "net.ipv4.ip_forward")
		}, "ok    forwarding: net.ipv4.ip_forward is on"},
		{func(c *Report) {
			c.forwarding(forward("0"), "net.ipv4.ip_forward")
		}, "ok    forwarding: net.ipv4.ip_forward is off; the proxy turns it on while it runs"},
		{func(c *Report) {
			c.forwarding(none, "net.ipv4.ip_forward")
		}, "fail  forwarding: net.ipv4.ip_forward: open "},

		{func(c *Report) { c.udpOffload(true, true) }, "ok    UDP offload: "},
		{func(c *Report) {
			c.udpOffload(true, false)
		}, "warn  UDP offload: the kernel has GSO: true, GRO: false — it works, more slowly"},

		{func(c *Report) { c.LogFiles("", "", "") }, ""},
		{func(c *Report) {
			c.LogFiles(dir, "", "")
		}, "warn  log.qlog_dir: each connection is written to "},
		{func(c *Report) {
			c.LogFiles(filepath.Join(dir, "none"), "", "")
		}, "fail  log.qlog_dir: stat "},
		{func(c *Report) {
			c.LogFiles("", filepath.Join(dir, "keys"), "")
		}, "warn  log.key_log: TLS secrets are written to "},
		{func(c *Report) {
			c.LogFiles("", "", filepath.Join(dir, "none", "pcap"))
		}, "fail  log.pcap: "},
	} {
		t.Run(test.want, func(t *testing.T) {
			lines, _ := report(t, test.check) // the verdict is part of the line
			if len(lines) != 1 || !strings.HasPrefix(lines[0], test.want) {
				t.Errorf("got %q, want %q", lines, test.want)
			}
		})
	}
}
