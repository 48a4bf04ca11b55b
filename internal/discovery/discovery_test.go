package discovery_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"masquevpn/internal/discovery"
	"masquevpn/internal/discovery/discoverytest"
)

// slowWorld is a world whose answers take some time.
type slowWorld struct {
	*discoverytest.World
	delay func(about string) time.Duration
}

func (w slowWorld) Resolver() *discovery.Resolver {
	r := w.World.Resolver()
	r.DNS, r.Fetch, r.Now = w, w.Fetch, time.Now
	return r
}

func (w slowWorld) Lookup(ctx context.Context, name string, t discovery.Type) (discovery.Answer,
	error) {
	if err := w.wait(ctx, t.String()+" "+name); err != nil {
		return discovery.Answer{}, errors.New("TIMEOUT")
	}
	return w.World.Lookup(ctx, name, t)
}

func (w slowWorld) Fetch(ctx context.Context, u *url.URL, addrs []netip.Addr) (*discovery.Response,
	error) {
	if err := w.wait(ctx, u.String()); err != nil {
		return nil, err
	}
	return w.World.Fetch(ctx, u, addrs)
}

func (w slowWorld) wait(ctx context.Context, about string) error {
	select {
	case <-time.After(w.delay(about)):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// TestAnswersInAnyOrder checks that the outcome of every vector is the same
// whatever answer comes first, and however the name is written.
func TestAnswersInAnyOrder(t *testing.T) {
	for _, v := range discoverytest.Vectors(t) {
		if v.Sequence != nil {
			continue
		}
		t.Run(v.Name, func(t *testing.T) {
			rapid.Check(t, func(rt *rapid.T) {
				delays := make(map[string]time.Duration)
				var mu sync.Mutex
				v := v
				if rapid.Bool().Draw(rt, "upper case") && !strings.Contains(v.Input, "xn--") {
					v.Input = strings.ToUpper(v.Input)
				}
				seed := rapid.Uint64().Draw(rt, "seed")
				var got map[string]any
				synctest.Test(t, func(t *testing.T) {
					w := slowWorld{v.World, func(about string) time.Duration {
						mu.Lock()
						defer mu.Unlock()
						if _, ok := delays[about]; !ok {
							seed = seed*6364136223846793005 + 1442695040888963407
							delays[about] = time.Duration(seed>>33%300) * time.Millisecond
						}
						return delays[about]
					}}
					got = discoverytest.Outcome(t.Context(), &v, w.Resolver())
				})
				discoverytest.Check(t, v.Expect, got)
			})
		})
	}
}

// TestNoEndlessAnswer checks that a resolution ends when nothing answers.
func TestNoEndlessAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := slowWorld{&discoverytest.World{}, func(string) time.Duration { return time.Hour }}
		start := time.Now()
		_, err := w.Resolver().Resolve(t.Context(), query("example.org"))
		var e *discovery.Error
		if !errors.As(err, &e) || e.Code != discovery.DNSFailure {
			t.Errorf("got %v, want %s", err, discovery.DNSFailure)
		}
		if took := time.Since(start); took > discovery.ResolutionTimeout {
			t.Errorf("it took %v, want at most %v", took, discovery.ResolutionTimeout)
		}
	})
}

// TestResolveCanceled checks that the end of the context ends a resolution at
// once, and that it says nothing about the delegation file.
func TestResolveCanceled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := time.Hour
		w := slowWorld{delegating(), func(string) time.Duration { return slow }}
		r := w.Resolver()
		ctx, cancel := context.WithCancelCause(t.Context())
		stop := errors.New("stop")
		time.AfterFunc(time.Second, func() { cancel(stop) })
		start := time.Now()
		if _, err := r.Resolve(ctx, query("example.org")); err != stop {
			t.Errorf("got %v, want the cause of the context's end", err)
		}
		if took := time.Since(start); took != time.Second {
			t.Errorf("it took %v, want 1s", took)
		}
		slow = 0
		res, err := r.Resolve(t.Context(), query("example.org"))
		if err != nil || res.WellKnown != "valid" {
			t.Errorf("afterwards: got %+v, %v, want a valid file", res, err)
		}
	})
}

func query(input string) discovery.Query {
	n, err := discovery.ParseInput(input)
	if err != nil {
		panic(err)
	}
	return discovery.Query{Name: n, Transports: []discovery.Transport{discovery.H3}, Private: true}
}

// delegating is a world in which example.org delegates to vpn.example.net.
func delegating() *discoverytest.World {
	addr := func(a string) []netip.Addr { return []netip.Addr{netip.MustParseAddr(a)} }
	return &discoverytest.World{Now: discoverytest.Epoch, DNS: map[string]discoverytest.Node{
		"example.org":     {A: addr("192.0.2.80")},
		"vpn.example.net": {A: addr("192.0.2.1")},
	}, HTTPS: map[string]discoverytest.Page{"https://example.org" +
		discovery.FilePath: {Status: 200,
		Body: `{"masque.server": "vpn.example.net"}`}}}
}

// TestWithoutFile checks that a slow delegation file holds up nobody: the
// domain's own records are handed out before, and the file still decides.
func TestWithoutFile(t *testing.T) {
	for _, tt := range []struct {
		name        string
		dns, file   time.Duration
		wantWithout bool
	}{
		{"the file is slower", 100 * time.Millisecond, 2 * time.Second, true},
		{"the file is faster", 400 * time.Millisecond, 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := slowWorld{delegating(), func(about string) time.Duration {
					if strings.HasPrefix(about, "https:") {
						return tt.file
					}
					if strings.HasSuffix(about, "example.org") && !strings.HasPrefix(about, "A") {
						return tt.dns
					}
					return 0
				}}
				q := query("example.org")
				var without []*discovery.Result
				start := time.Now()
				q.WithoutFile = func(r *discovery.Result) {
					if took := time.Since(start); took != tt.dns {
						t.Errorf("WithoutFile is called after %v, want %v", took, tt.dns)
					}
					without = append(without, r)
				}
				res, err := w.Resolver().Resolve(t.Context(), q)
				if err != nil {
					t.Fatal(err)
				}
				if res.Authority != "vpn.example.net" || res.WellKnown != "valid" {
					t.Errorf("got %+v, want the server of the file", res)
				}
				if (len(without) == 1) != tt.wantWithout {
					t.Fatalf("WithoutFile is called %d times", len(without))
				}
				if tt.wantWithout &&
					(without[0].Authority != "example.org" || without[0].WellKnown != "none") {
					t.Errorf("without the file: got %+v, want the domain's own addresses",
						without[0])
				}
			})
		})
	}
}

// TestOneRequestForEachName checks that resolutions at the same time share one
// request for the delegation file.
func TestOneRequestForEachName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := slowWorld{delegating(), func(string) time.Duration { return 10 * time.Millisecond }}
		r := w.Resolver()
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if res, err := r.Resolve(t.Context(), query("example.org")); err != nil ||
					res.Authority != "vpn.example.net" {
					t.Errorf("got %+v, %v", res, err)
				}
			})
		}
		wg.Wait()
		if len(w.Fetches) != 1 {
			t.Errorf("got %d requests, want 1", len(w.Fetches))
		}
		r.Forget()
		if _, err := r.Resolve(t.Context(), query("example.org")); err != nil ||
			len(w.Fetches) != 2 {
			t.Errorf("after Forget: got %d requests and %v, want 2", len(w.Fetches), err)
		}
	})
}

// TestQuestionsAreBounded checks how much a resolution asks at most, and how
// many questions wait at the same time.
func TestQuestionsAreBounded(t *testing.T) {
	w := &discoverytest.World{Now: discoverytest.Epoch, DNS: map[string]discoverytest.Node{}}
	var records []string
	for i := range 100 {
		records = append(records, fmt.Sprintf("%d 0 443 p%d.example.org.", i, i))
	}
	w.DNS["_masque._udp.example.org"] = discoverytest.Node{SRV: records}
	w.DNS["_masque._tcp.example.org"] = discoverytest.Node{SRV: records}
	synctest.Test(t, func(t *testing.T) {
		s := slowWorld{w, func(string) time.Duration { return time.Millisecond }}
		r := s.Resolver()
		counted := &countingDNS{DNS: r.DNS}
		r.DNS = counted
		q := query("example.org")
		q.Transports = []discovery.Transport{discovery.H3, discovery.H2}
		if _, err := r.Resolve(t.Context(), q); err == nil {
			t.Error("got a result, want an error")
		}
		if most := 2 + 1 + 2 + 2*discovery.MaxSRV; w.Questions > most {
			t.Errorf("got %d questions, want at most %d", w.Questions, most)
		}
		if counted.most != discovery.MaxParallel {
			t.Errorf("got %d questions at the same time, want %d", counted.most,
				discovery.MaxParallel)
		}
	})
}

type countingDNS struct {
	discovery.DNS
	mu        sync.Mutex
	now, most int
}

func (d *countingDNS) Lookup(ctx context.Context, name string, t discovery.Type) (discovery.Answer,
	error) {
	d.mu.Lock()
	d.now++
	d.most = max(d.most, d.now)
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		d.now--
		d.mu.Unlock()
	}()
	return d.DNS.Lookup(ctx, name, t)
}

// TestManyDomains checks that neither memory nor goroutines grow with the
// number of resolutions.
func TestManyDomains(t *testing.T) {
	w := &discoverytest.World{Now: discoverytest.Epoch, DNS: map[string]discoverytest.Node{},
		HTTPS: map[string]discoverytest.Page{}}
	r := w.Resolver()
	before := runtime.NumGoroutine()
	for i := range 10_000 {
		host := fmt.Sprintf("d%d.example", i)
		addr := []netip.Addr{netip.MustParseAddr("192.0.2.1")}
		w.DNS = map[string]discoverytest.Node{host: {A: addr},
			"_masque._udp." + host: {SRV: []string{"0 0 1 " + host + "."}}}
		w.Fetches = nil
		if _, err := r.Resolve(t.Context(), query(host)); err != nil {
			t.Fatal(err)
		}
		w.Now = w.Now.Add(time.Second)
	}
	files, records, has := r.Cached("d9999.example")
	if files > discovery.MaxCached || records > discovery.MaxCached {
		t.Errorf("got %d files and the records of %d domains, want at most %d each", files, records,
			discovery.MaxCached)
	}
	if !has {
		t.Error("the newest domain is not kept")
	}
	if after := runtime.NumGoroutine(); after > before+2 {
		t.Errorf("got %d goroutines, want %d as before", after, before)
	}
}

// TestFileIsReadToTheLimit checks that a body without end is read to the limit
// alone.
func TestFileIsReadToTheLimit(t *testing.T) {
	w := delegating()
	r := w.Resolver()
	body := &endless{}
	r.Fetch = func(context.Context, *url.URL, []netip.Addr) (*discovery.Response, error) {
		return &discovery.Response{Status: 200, Header: http.Header{"Content-Length": {"10"}},
			Body: body}, nil
	}
	res, err := r.Resolve(t.Context(), query("example.org"))
	if err != nil || res.WellKnown != "error: too large" {
		t.Errorf("got %+v, %v, want a file that is too large", res, err)
	}
	if body.read != discovery.MaxFile+1 || !body.closed {
		t.Errorf("%d bytes are read, want %d; closed: %v", body.read, discovery.MaxFile+1,
			body.closed)
	}
}

type endless struct {
	read   int
	closed bool
}

func (e *endless) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = ' '
	}
	e.read += len(b)
	return len(b), nil
}

func (e *endless) Close() error {
	e.closed = true
	return nil
}

// TestSlowBody checks that a body that stops ends after the time for the file.
func TestSlowBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := slowWorld{delegating(), func(string) time.Duration { return 0 }}
		r := w.Resolver()
		r.Fetch = func(ctx context.Context, _ *url.URL, _ []netip.Addr) (*discovery.Response,
			error) {
			pr, pw := io.Pipe()
			context.AfterFunc(ctx, func() { pw.CloseWithError(ctx.Err()) })
			return &discovery.Response{Status: 200, Header: http.Header{}, Body: pr}, nil
		}
		start := time.Now()
		res, err := r.Resolve(t.Context(), query("example.org"))
		if err != nil || res.WellKnown != "error: timeout" {
			t.Errorf("got %+v, %v, want a timeout", res, err)
		}
		if took := time.Since(start); took != discovery.FileTimeout {
			t.Errorf("it took %v, want %v", took, discovery.FileTimeout)
		}
	})
}

// TestFirstAnswerOfTheFile checks that the first request has 3 seconds for its
// answer, and that further ones have what is left.
func TestFirstAnswerOfTheFile(t *testing.T) {
	for _, tt := range []struct {
		name          string
		first, second time.Duration
		took          time.Duration
		wellKnown     string
	}{
		{"the first is slow", 4 * time.Second, 0, discovery.AnswerTimeout, "error: timeout"},
		{"the second is slow", 0, 4 * time.Second, 4 * time.Second, "valid"},
		{"both are slow", 2 * time.Second, 4 * time.Second, discovery.FileTimeout,
			"error: timeout"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				base := delegating()
				base.HTTPS["https://example.org/a"] = base.HTTPS["https://example.org"+
					discovery.FilePath]
				base.HTTPS["https://example.org"+
					discovery.FilePath] = discoverytest.Page{Status: 302,
					Headers: map[string]string{"location": "/a"}}
				w := slowWorld{base, func(about string) time.Duration {
					switch about {
					case "https://example.org" + discovery.FilePath:
						return tt.first
					case "https://example.org/a":
						return tt.second
					}
					return 0
				}}
				start := time.Now()
				res, err := w.Resolver().Resolve(t.Context(), query("example.org"))
				if err != nil || res.WellKnown != tt.wellKnown || time.Since(start) != tt.took {
					t.Errorf("got %+v, %v after %v, want %q after %v", res, err, time.Since(start),
						tt.wellKnown,
						tt.took)
				}
			})
		})
	}
}

// TestAsked checks the report of questions.
func TestAsked(t *testing.T) {
	w := delegating()
	w.DNS["_masque._udp.example.org"] = discoverytest.Node{Fail: map[string]string{"SRV": "SERVFAIL"}}
	q := query("example.org")
	q.Method = discovery.DNSOnly
	got := make(map[string]string)
	q.Asked = func(q discovery.Question) {
		got[q.Type.String()+" "+q.Name] = strings.Join(append([]string{q.Status}, q.Answer...), " ")
	}
	if _, err := w.Resolver().Resolve(t.Context(), q); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"A example.org":                "ok 192.0.2.80",
		"AAAA example.org":             "none",
		"HTTPS example.org":            "none",
		"SRV _masque._udp.example.org": "SERVFAIL",
		"SRV _masque._tcp.example.org": "none",
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestPortAsksNothingElse checks that an explicit port turns discovery off.
func TestPortAsksNothingElse(t *testing.T) {
	w := delegating()
	q := query("example.org:443")
	var asked []string
	q.Asked = func(q discovery.Question) { asked = append(asked, q.Type.String()) }
	res, err := w.Resolver().Resolve(t.Context(), q)
	if err != nil || res.Authority != "example.org:443" {
		t.Fatalf("got %+v, %v", res, err)
	}
	slices.Sort(asked)
	if !slices.Equal(asked, []string{"A", "AAAA"}) || len(w.Fetches) != 0 {
		t.Errorf("asked for %v and %v, want for addresses alone", asked, w.Fetches)
	}
}

// TestNamesAndAddressesOfResults checks in random worlds that every name that a
// certificate may have is the input, the delegated name, an address of the
// operator, or the target of a signed record, and that every address may be
// used.
func TestNamesAndAddressesOfResults(t *testing.T) {
	names := []string{"example.org", "a.example.org", "b.example.net", "c.example.net"}
	addrs := []string{"192.0.2.1", "127.0.0.1", "10.0.0.1", "169.254.169.254", "2001:db8::1", "::1",
		"fd00::1",
		"64:ff9b::7f00:1", "198.51.100.1"}
	rapid.Check(t, func(t *rapid.T) {
		w := randomWorld(t, names, addrs)
		q := query("example.org")
		q.DNSSEC = rapid.SampledFrom([]discovery.DNSSEC{discovery.DNSSECOff, discovery.DNSSECUse,
			discovery.DNSSECRequire}).Draw(t, "dnssec")
		q.Purpose = rapid.SampledFrom([]discovery.Purpose{discovery.Client, discovery.Peer}).Draw(t,
			"purpose")
		q.Private = q.Purpose == discovery.Client
		q.Transports = rapid.SampledFrom([][]discovery.Transport{{discovery.H3},
			{discovery.H3, discovery.H2}}).Draw(t, "transports")
		res, err := w.Resolver().Resolve(context.Background(), q)
		if err != nil {
			var e *discovery.Error
			if !errors.As(err, &e) || e.Reason == "" || e.Remedy == "" {
				t.Fatalf("got the error %#v, want an Error with a reason and a remedy", err)
			}
			return
		}
		if len(res.Groups) == 0 {
			t.Fatalf("got no group: %+v", res)
		}
		for _, g := range res.Groups {
			for _, r := range g.Records {
				checkRecord(t, res, &r, &q)
			}
		}
	})
}

func checkRecord(t *rapid.T, res *discovery.Result, r *discovery.Record, q *discovery.Query) {
	if len(r.Addresses) == 0 || r.Port == 0 {
		t.Fatalf("the record %+v cannot be dialed", r)
	}
	for _, name := range r.Verify {
		ok := name == "example.org" && res.Delegated == (discovery.Name{}) ||
			name == res.Delegated.Host() ||
			name == res.Delegated.Addr().String() || r.Signed && name == r.Target
		if !ok {
			t.Fatalf("the certificate may be for %s: %+v", name, res)
		}
	}
	for _, a := range r.Addresses {
		if r.Target != "example.org" && q.Forbids(a) {
			t.Fatalf("the address %s is used: %+v", a, res)
		}
	}
}

func randomWorld(t *rapid.T, names, addrs []string) *discoverytest.World {
	name := rapid.SampledFrom(names)
	w := &discoverytest.World{Now: discoverytest.Epoch, DNS: make(map[string]discoverytest.Node),
		HTTPS: make(map[string]discoverytest.Page)}
	for _, n := range names {
		w.DNS[n] = randomNode(t, n, name, addrs)
		for _, service := range []string{"_masque._udp.", "_masque._tcp.", "_masque-fed._udp."} {
			if rapid.Bool().Draw(t, service+n) {
				w.DNS[service+n] = discoverytest.Node{SRV: []string{fmt.Sprintf("%d %d %d %s.",
					rapid.IntRange(0, 2).Draw(t, "priority"),
					rapid.IntRange(0, 2).Draw(t, "weight"), rapid.IntRange(0, 3).Draw(t, "port"),
					name.Draw(t, "target"))}}
			}
		}
	}
	if rapid.Bool().Draw(t, "file") {
		value := rapid.SampledFrom(append([]string{"192.0.2.9", "127.0.0.1:1",
			"a.example.org:8443"},
			names...)).Draw(t, "value")
		w.HTTPS["https://example.org"+discovery.FilePath] = discoverytest.Page{Status: 200,
			Body: fmt.Sprintf(`{"masque.server": %q}`, value)}
	}
	w.Signed = rapid.SliceOf(name).Draw(t, "signed")
	return w
}

func randomNode(t *rapid.T, n string, name *rapid.Generator[string],
	addrs []string) discoverytest.Node {
	var v discoverytest.Node
	switch rapid.IntRange(0, 9).Draw(t, "kind of "+n) {
	case 0:
		v.Fail = map[string]string{"*": "SERVFAIL"}
	case 1:
		v.CNAME = name.Draw(t, "alias") + "."
	case 2:
		v.HTTPS = []string{"0 " + name.Draw(t, "alias") + "."}
	case 3:
		v.HTTPS = []string{"1 " + name.Draw(t, "target") + ". alpn=h3 port=8443"}
	}
	for _, a := range rapid.SliceOfN(rapid.SampledFrom(addrs), 0, 4).Draw(t, "addresses of "+n) {
		if ip := netip.MustParseAddr(a); ip.Is4() {
			v.A = append(v.A, ip)
		} else {
			v.AAAA = append(v.AAAA, ip)
		}
	}
	return v
}

func FuzzParseInput(f *testing.F) {
	for _, s := range []string{"example.org", "[2001:db8::1]:443", "192.0.2.1", "bücher.example",
		"a:1", "[", "::", "."} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := discovery.ParseInput(s)
		if err != nil {
			var e *discovery.Error
			if !errors.As(err, &e) || e.Code != discovery.InvalidName {
				t.Fatalf("got the error %v, want %s", err, discovery.InvalidName)
			}
			return
		}
		again, err := discovery.ParseName(n.String())
		if err != nil || again != n {
			t.Errorf("%q is %v, which is parsed as %v, %v", s, n, again, err)
		}
		if (n.Host() == "") != n.Addr().IsValid() || n.Host() != strings.ToLower(n.Host()) {
			t.Errorf("got %#v", n)
		}
	})
}

func FuzzParseFile(f *testing.F) {
	for _, s := range []string{`{"masque.server":"a.example"}`,
		`{"masque.peer":[{}],"masque.server":"x"}`, `{`, `null`,
		"\xef\xbb\xbf{}", `{"a":{"a":1,"a":2}}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		for _, p := range []discovery.Purpose{discovery.Client, discovery.Peer} {
			if n, err := discovery.ParseFile(body, p); err == nil && n == (discovery.Name{}) {
				t.Error("got no name without an error")
			}
		}
	})
}

func FuzzFreshness(f *testing.F) {
	f.Add("max-age=60, no-store", "Thu, 01 Jan 2026 00:00:00 GMT", "10")
	f.Add(`max-age="60"`, "0", "-1")
	f.Fuzz(func(t *testing.T, control, expires, age string) {
		h := http.Header{"Cache-Control": {control}, "Expires": {expires}, "Age": {age}}
		if l := discovery.FileLifetime(h, discoverytest.Epoch); l < discovery.MinLifetime ||
			l > discovery.MaxLifetime {
			t.Errorf("got %v, want at least %v and at most %v", l, discovery.MinLifetime,
				discovery.MaxLifetime)
		}
	})
}

// TestUntil checks the lifetime of results without DNS records.
func TestUntil(t *testing.T) {
	hosts := map[string][]netip.Addr{"vpn.example.net": {netip.MustParseAddr("192.0.2.1")}}
	for _, tt := range []struct {
		name, input, file string
		hosts             map[string][]netip.Addr
		want              time.Duration // 0: none
	}{
		{"an address", "192.0.2.1", "", nil, 0},
		{"a name in the host's table", "vpn.example.net", "", hosts, 30 * time.Second},
		{"a file that names an address", "example.org", "192.0.2.1", nil, time.Hour},
		{"a file that names a name in the host's table", "example.org", "vpn.example.net:443",
			hosts, time.Hour},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := delegating()
			w.Hosts = tt.hosts
			w.HTTPS["https://example.org"+discovery.FilePath] = discoverytest.Page{Status: 200,
				Headers: map[string]string{"cache-control": "max-age=3600"},
				Body:    fmt.Sprintf(`{"masque.server": %q}`, tt.file)}
			res, err := w.Resolver().Resolve(t.Context(), query(tt.input))
			if err != nil {
				t.Fatal(err)
			}
			want := time.Time{}
			if tt.want != 0 {
				want = discoverytest.Epoch.Add(tt.want)
			}
			if !res.Until.Equal(want) || res.TTL >= 0 {
				t.Errorf("got a lifetime until %v and the TTL %v, want until %v and none",
					res.Until, res.TTL, want)
			}
		})
	}
}
