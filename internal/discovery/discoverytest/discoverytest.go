// Package discoverytest has worlds of DNS and web servers for tests of
// discovery, and the cases of testdata, which resolve names in them.
package discoverytest

import (
	"bytes"
	"cmp"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"masquevpn/internal/discovery"
)

//go:embed testdata
var testdata embed.FS

// Rand returns a source of random numbers that are always the same.
func Rand() *rand.Rand { return rand.New(rand.NewPCG(1, 2)) }

// Epoch is when the cases begin.
var Epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// A World is the DNS and the web that a resolution sees. See the description in
// testdata/resolve.json.
type World struct {
	DNS    map[string]Node         `json:"dns"`
	HTTPS  map[string]Page         `json:"https"`
	Hosts  map[string][]netip.Addr `json:"hosts"`
	Signed []string                `json:"signed"`

	Now       time.Time    // as the resolver sees it
	mu        sync.RWMutex // guards all of the above and the following
	Questions int          // so far
	Fetches   []string     // URLs, so far
}

// A Node has the records of one name, as a zone file has them. TTL is in
// seconds, 300 if it is nil. Fail has the status of failures by type, or for
// "*".
type Node struct {
	A, AAAA    []netip.Addr
	CNAME      string
	SRV, HTTPS []string
	TTL        *int              `json:"ttl"`
	Fail       map[string]string `json:"fail"`
}

// A Page is the answer for a URL. Error is "timeout", "certificate" or another
// failure.
type Page struct {
	Status  int               `json:"status"`
	Headers map[string]string `json:"headers"`
	Body    string            `json:"body"`
	PadTo   int               `json:"pad_to"`
	Error   string            `json:"error"`
}

// Become makes w as another world is, at a time after Epoch.
func (w *World) Become(other *World, at time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.DNS, w.HTTPS, w.Hosts, w.Signed = other.DNS, other.HTTPS, other.Hosts, other.Signed
	w.Now = Epoch.Add(at)
}

// Time returns Now.
func (w *World) Time() time.Time {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.Now
}

// node returns the records of a name, and reports whether they are signed.
func (w *World) node(name string) (Node, bool) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.DNS[name], w.isSigned(name)
}

// Page returns the answer for a URL, and reports whether there is one.
func (w *World) Page(u *url.URL) (Page, bool) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	p, ok := w.HTTPS[u.String()]
	return p, ok
}

// Resolver returns a resolver in w.
func (w *World) Resolver() *discovery.Resolver {
	return &discovery.Resolver{DNS: w, Fetch: w.Fetch, Hosts: w.LookupHosts, Local: w.LookupLocal,
		Now: w.Time, Rand: Rand(), NoJitter: true}
}

// LookupHosts is Resolver.Hosts.
func (w *World) LookupHosts(name string) []netip.Addr {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.Hosts[name]
}

// LookupLocal is Resolver.Local.
func (w *World) LookupLocal(_ context.Context, name string) ([]netip.Addr, error) {
	n, _ := w.node(name)
	return append(slices.Clone(n.AAAA), n.A...), nil
}

// isSigned reports whether answers about a name have the AD bit. It is called
// with w.mu held.
func (w *World) isSigned(name string) bool {
	return slices.ContainsFunc(w.Signed, func(zone string) bool {
		return name == zone || strings.HasSuffix(name, "."+zone)
	})
}

// Lookup implements discovery.DNS.
func (w *World) Lookup(_ context.Context, name string, t discovery.Type) (discovery.Answer, error) {
	w.mu.Lock()
	w.Questions++
	w.mu.Unlock()
	a := discovery.Answer{TTL: time.Hour, Secure: true}
	seen := make(map[string]bool)
	for {
		n, signed := w.node(name)
		a.Secure = a.Secure && signed
		if f := cmp.Or(n.Fail[t.String()], n.Fail["*"]); f != "" {
			return discovery.Answer{}, errors.New(f)
		}
		a.TTL = min(a.TTL, 300*time.Second)
		if n.TTL != nil {
			a.TTL = min(a.TTL, time.Duration(*n.TTL)*time.Second)
		}
		if n.CNAME == "" {
			return a, n.add(&a, t)
		}
		seen[name] = true
		name = strings.ToLower(strings.TrimSuffix(n.CNAME, "."))
		if a.Aliases = append(a.Aliases, name); seen[name] || len(a.Aliases) > 8 {
			return discovery.Answer{}, fmt.Errorf("LOOP: %w", discovery.ErrAliases)
		}
	}
}

// add adds the records of a type to a.
func (n Node) add(a *discovery.Answer, t discovery.Type) error {
	switch t {
	case discovery.TypeA:
		a.Addrs = n.A
	case discovery.TypeAAAA:
		a.Addrs = n.AAAA
	case discovery.TypeSRV:
		for _, s := range n.SRV {
			r, err := parseSRV(s)
			if err != nil {
				return err
			}
			a.SRV = append(a.SRV, r)
		}
	case discovery.TypeHTTPS:
		for _, s := range n.HTTPS {
			a.HTTPS = append(a.HTTPS, parseHTTPS(s))
		}
	}
	return nil
}

// parseSRV parses the data of an SRV record as a zone file has it.
func parseSRV(s string) (r discovery.SRV, err error) {
	_, err = fmt.Sscan(s, &r.Priority, &r.Weight, &r.Port, &r.Target)
	return r, err
}

// parseHTTPS parses the data of an HTTPS record as a zone file has it.
func parseHTTPS(s string) discovery.HTTPS {
	keys := map[string]uint16{"alpn": 1, "no-default-alpn": 2, "port": 3, "ipv4hint": 4, "ech": 5,
		"ipv6hint": 6}
	fields := strings.Fields(s)
	priority, _ := strconv.Atoi(fields[0])
	h := discovery.HTTPS{Priority: uint16(priority), Target: fields[1]}
	for _, f := range fields[2:] {
		key, value, _ := strings.Cut(f, "=")
		value = strings.Trim(value, `"`)
		switch key {
		case "alpn":
			h.ALPN = strings.Split(value, ",")
		case "port":
			port, _ := strconv.Atoi(value)
			h.Port, h.HasPort = uint16(port), true
		case "mandatory":
			for k := range strings.SplitSeq(value, ",") {
				number, ok := keys[k]
				if !ok {
					n, _ := strconv.Atoi(strings.TrimPrefix(k, "key"))
					number = uint16(n)
				}
				h.Mandatory = append(h.Mandatory, number)
			}
		}
	}
	return h
}

// Fetch is a discovery.Fetch.
func (w *World) Fetch(_ context.Context, u *url.URL, addrs []netip.Addr) (*discovery.Response,
	error) {
	w.mu.Lock()
	w.Fetches = append(w.Fetches, u.String())
	w.mu.Unlock()
	if len(addrs) == 0 {
		return nil, errors.New("no address to connect to")
	}
	p, ok := w.Page(u)
	switch {
	case !ok:
		return nil, errors.New("connection refused")
	case p.Error == "timeout":
		return nil, context.DeadlineExceeded
	case p.Error == "certificate":
		return nil, discovery.ErrCertificate
	case p.Error != "":
		return nil, errors.New(p.Error)
	}
	h := make(http.Header)
	for k, v := range p.Headers {
		h.Set(k, v)
	}
	if len(p.Body) < p.PadTo {
		p.Body += strings.Repeat(" ", p.PadTo-len(p.Body))
	}
	return &discovery.Response{Status: p.Status, Header: h,
		Body: io.NopCloser(strings.NewReader(p.Body))}, nil
}

// A Vector is a case of testdata/resolve.json.
type Vector struct {
	Name, Rule, Input string
	Purpose           string
	Transports        []discovery.Transport
	DNSSEC            string
	ServerName        string `json:"server_name"`
	World             *World
	Expect            Expectation
	Sequence          []struct {
		At     int
		World  *World
		Expect Expectation
	}
}

// An Expectation has the members of a result or an error. Those that are not
// there are not compared, unless the description of the file says so.
type Expectation map[string]json.RawMessage

// Query returns the query of v, or the error of its input.
func (v *Vector) Query() (discovery.Query, error) {
	q := discovery.Query{Transports: v.Transports, ServerName: v.ServerName}
	if len(q.Transports) == 0 {
		q.Transports = []discovery.Transport{discovery.H3}
	}
	q.Private = v.Purpose != "peer"
	if !q.Private {
		q.Purpose = discovery.Peer
	}
	q.DNSSEC = map[string]discovery.DNSSEC{"use": discovery.DNSSECUse,
		"require": discovery.DNSSECRequire}[v.DNSSEC]
	var err error
	q.Name, err = discovery.ParseInput(v.Input)
	return q, err
}

// Vectors returns the cases of testdata.
func Vectors(t testing.TB) []Vector {
	t.Helper()
	var all []Vector
	for _, name := range []string{"testdata/resolve.json", "testdata/more.json"} {
		data, err := testdata.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var file struct{ Cases []Vector }
		if err := json.Unmarshal(data, &file); err != nil {
			t.Fatal(err)
		}
		all = append(all, file.Cases...)
	}
	return all
}

// Outcome returns the outcome of a vector as the object that programs print.
func Outcome(ctx context.Context, v *Vector, r *discovery.Resolver) map[string]any {
	q, err := v.Query()
	var res *discovery.Result
	if err == nil {
		res, err = r.Resolve(ctx, q)
	}
	if err != nil {
		var e *discovery.Error
		if !errors.As(err, &e) {
			return map[string]any{"error": err.Error()}
		}
		return object(map[string]any{"error": e.Code, "skipped": e.Skipped,
			"well_known": e.WellKnown,
			"says":       e.Error(),
			"exit":       map[bool]int{true: 2, false: 5}[e.Code == discovery.InvalidName]})
	}
	return object(res)
}

// object returns v as JSON has it, without empty members.
func object(v any) map[string]any {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	var m map[string]any
	if err := json.Unmarshal(data, &m); err != nil {
		panic(err)
	}
	for k, v := range m {
		if v == nil {
			delete(m, k)
		}
	}
	return m
}

// Check compares an outcome with what is expected.
func Check(t *testing.T, want Expectation, got map[string]any) {
	t.Helper()
	for _, k := range []string{"error", "groups", "secure", "degraded", "stale", "skipped"} {
		if _, ok := want[k]; !ok && got[k] != nil {
			t.Errorf("%s: got %v, want none", k, got[k])
		}
	}
	for k, raw := range want {
		var w any
		if err := json.Unmarshal(raw, &w); err != nil {
			t.Fatal(err)
		}
		g := got[k]
		switch k {
		case "says":
			if s, _ := g.(string); !strings.Contains(s, w.(string)) {
				t.Errorf("message: got %q, want one with %q", s, w)
			}
			continue
		case "groups":
			sortRecords(g)
			sortRecords(w)
		}
		if !reflect.DeepEqual(g, w) {
			t.Errorf("%s: got %v, want %v", k, g, w)
		}
	}
}

// sortRecords makes the order of records in groups comparable: weights allow
// any.
func sortRecords(groups any) {
	list, _ := groups.([]any)
	for _, g := range list {
		records := g.(map[string]any)["records"].([]any)
		slices.SortFunc(records, func(a, b any) int {
			x, _ := json.Marshal(a)
			y, _ := json.Marshal(b)
			return bytes.Compare(x, y)
		})
	}
}
