package proxy

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"log/slog"
	"math/big"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/internal/discovery"
	"masquevpn/internal/federation"
)

// peerWorld is what a peerDialer sees in tests: names and servers. Its fields
// are changed only while the dialer waits.
type peerWorld struct {
	t       *testing.T
	key     *ecdsa.PrivateKey
	ca      *x509.Certificate
	roots   *x509.CertPool
	d       *peerDialer
	results map[string]*discovery.Result // key: domain; nil: DNS fails
	servers map[netip.Addr]*fakeServer
	peers   []Peer

	// mu guards the fields while time passes in after.
	mu          sync.Mutex
	resolutions int
	theirs      map[pairKey]bool // pairs that the peers carry
	conns       []*fakeConn      // all so far
	asked       []string         // "connection domain after start", in order
	start       time.Time
}

// fakeServer is a server of peers.
type fakeServer struct {
	names    []string       // in its certificate
	statuses map[string]int // key: domain; 200 without an entry
	down     bool
}

// fakeConn is a connection with a fakeServer.
type fakeConn struct {
	w      *peerWorld
	name   string
	to     *fakeServer
	record discovery.Record
	chain  []*x509.Certificate
	ended  chan struct{}
	closed atomic.Int64 // a time.Duration after the start
	carry  map[string]chan error
}

func (c *fakeConn) server() (discovery.Record, []*x509.Certificate) {
	return c.record, c.chain
}
func (c *fakeConn) done() <-chan struct{} { return c.ended }

func (c *fakeConn) close() {
	select {
	case <-c.ended:
	default:
		c.closed.Store(int64(time.Since(c.w.start)))
		close(c.ended)
	}
}

func (c *fakeConn) ask(_ context.Context, p *Peer, _ federation.Proof, _ string) (int, carryFunc,
	error) {
	at := time.Since(c.w.start).Round(time.Millisecond)
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	c.w.asked = append(c.w.asked, c.name+" "+p.Domain+" "+at.String())
	if s := c.to.statuses[p.Domain]; s != 0 {
		return s, nil, nil
	}
	end := make(chan error, 1)
	c.carry[p.Domain] = end
	return http.StatusOK, func(ctx context.Context) error {
		select {
		case err := <-end:
			return err
		case <-c.ended:
			return errors.New("the connection has ended")
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}, nil
}

// errStreamReset is the error of a stream that a peer reset.
var errStreamReset = &quic.StreamError{Remote: true,
	ErrorCode: quic.StreamErrorCode(http3.ErrCodeRequestCanceled)}

// run runs test beside a dialer for the peers of w.
func runPeers(t *testing.T, prepare, test func(w *peerWorld)) {
	synctest.Test(t, func(t *testing.T) {
		w := &peerWorld{t: t, roots: x509.NewCertPool(),
			results: make(map[string]*discovery.Result),
			servers: make(map[netip.Addr]*fakeServer),
			theirs:  make(map[pairKey]bool), start: time.Now()}
		w.newAuthority()
		w.d = newPeerDialer(slog.New(slog.DiscardHandler))
		w.d.jitter = 0
		w.d.carried = func(k pairKey) bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.theirs[k]
		}
		w.d.resolve, w.d.connect = w.resolve, w.connect
		prepare(w)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			w.d.run(ctx, w.peers, &Federation{})
		}()
		synctest.Wait()
		test(w)
		stopped := time.Now()
		cancel()
		<-ended
		if d := time.Since(stopped); d != 0 {
			t.Errorf("the dialer ended after %v, want at once", d)
		}
		for _, c := range w.conns {
			select {
			case <-c.ended:
			default:
				t.Errorf("the connection %s stays open", c.name)
			}
		}
	})
}

// peer adds a peer whose domain leads to addr.
func (w *peerWorld) peer(domain, addr string) *Peer {
	w.peers = append(w.peers, Peer{Domain: domain, Local: "a.example", CA: w.roots,
		WellKnown: true, DNSSEC: true, Connect: true})
	w.results[domain] = &discovery.Result{Step: "address", Authority: domain,
		Until: time.Now().Add(time.Hour), FileUntil: time.Now().Add(time.Hour),
		Groups: []discovery.Group{{Records: []discovery.Record{{Target: domain, Port: 443,
			Addresses: []netip.Addr{netip.MustParseAddr(addr)}, SNI: domain,
			Verify: []string{domain}}}}}}
	return &w.peers[len(w.peers)-1]
}

func (w *peerWorld) server(addr string, names ...string) *fakeServer {
	s := &fakeServer{names: names, statuses: make(map[string]int)}
	w.servers[netip.MustParseAddr(addr)] = s
	return s
}

func (w *peerWorld) resolve(_ context.Context, p *Peer) (*discovery.Result, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.resolutions++
	if r := w.results[p.Domain]; r != nil {
		return r, nil
	}
	return nil, &discovery.Error{Code: discovery.DNSFailure, Reason: "DNS does not answer"}
}

// connect takes 100 ms.
func (w *peerWorld) connect(ctx context.Context, _ *Peer, _ *federation.Peer,
	r *discovery.Result) (serverConn, error) {
	select {
	case <-time.After(100 * time.Millisecond):
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.servers[r.Addrs()[0].Addr()]
	if s == nil || s.down {
		return nil, errors.New("no answer")
	}
	c := &fakeConn{w: w, name: string(rune('A' + len(w.conns))), to: s, chain: w.issue(s.names),
		record: r.Groups[0].Records[0], ended: make(chan struct{}),
		carry: make(map[string]chan error)}
	w.conns = append(w.conns, c)
	return c, nil
}

// newAuthority makes the authority of all servers.
func (w *peerWorld) newAuthority() {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	w.key, w.ca = key, &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true,
		BasicConstraintsValid: true, NotBefore: time.Now(), NotAfter: time.Now().AddDate(1, 0, 0)}
	w.ca = w.issue(nil)[0]
	w.roots.AddCert(w.ca)
}

// issue returns a certificate with names; without names it is the authority's.
func (w *peerWorld) issue(names []string) []*x509.Certificate {
	template := w.ca
	if names != nil {
		template = &x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: names,
			NotBefore: w.start, NotAfter: w.start.AddDate(1, 0, 0)}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, w.ca, &w.key.PublicKey, w.key)
	if err != nil {
		w.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		w.t.Fatal(err)
	}
	return []*x509.Certificate{cert}
}

// after lets time pass until d after the start.
func (w *peerWorld) after(d time.Duration) {
	func() { // orders the test's accesses before those of the dialer
		w.mu.Lock()
		defer w.mu.Unlock()
	}()
	time.Sleep(time.Until(w.start.Add(d)))
	synctest.Wait()
}

// expect compares the requests so far.
func (w *peerWorld) expect(want ...string) {
	w.t.Helper()
	if !slices.Equal(w.asked, want) {
		w.t.Errorf("got requests %q, want %q", w.asked, want)
	}
}

func (w *peerWorld) state(domain string) PeerStatus {
	for i := range w.peers {
		if w.peers[i].Domain == domain {
			return w.d.state(&w.peers[i])
		}
	}
	return PeerStatus{}
}

func delegatedTo(name string) discovery.Name {
	n, err := discovery.ParseName(name)
	if err != nil {
		panic(err)
	}
	return n
}

// F10: a connection serves further pairs.
func TestPeersReuseConnection(t *testing.T) {
	const hoster = "gw.hoster.example"
	for _, tc := range []struct {
		name   string
		cert   []string
		change func(c *Peer, r *discovery.Result)
		conns  int
	}{
		{"certificate for both domains", []string{"b.example", "c.example"},
			func(*Peer, *discovery.Result) {}, 1},
		{"delegation file names the server", []string{"b.example", hoster},
			func(_ *Peer, r *discovery.Result) { r.Delegated = delegatedTo(hoster) }, 1},
		{"delegation file does not count", []string{"b.example", hoster},
			func(c *Peer, r *discovery.Result) {
				c.WellKnown, r.Delegated = false, delegatedTo(hoster)
			}, 2},
		{"signed SRV record names the server", []string{"b.example", hoster},
			func(_ *Peer, r *discovery.Result) {
				r.Groups[0].Records[0].Target, r.Groups[0].Records[0].Signed = hoster, true
			}, 1},
		{"SRV record without a signature", []string{"b.example", hoster},
			func(_ *Peer, r *discovery.Result) { r.Groups[0].Records[0].Target = hoster }, 2},
		{"another server", []string{"b.example"}, func(*Peer, *discovery.Result) {}, 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			runPeers(t, func(w *peerWorld) {
				w.peer("b.example", "192.0.2.1")
				c := w.peer("c.example", "192.0.2.2")
				tc.change(c, w.results["c.example"])
				w.server("192.0.2.1", tc.cert...)
				w.server("192.0.2.2", "c.example", hoster)
				w.peers[1].Connect = false
			}, func(w *peerWorld) {
				w.after(time.Second)
				w.peers[1].Connect = true
				w.d.setPeers(w.peers, &Federation{})
				w.after(2 * time.Second)
				if len(w.conns) != tc.conns || len(w.asked) != 2 {
					t.Errorf("got %d connections, requests %q; want %d and 2 requests",
						len(w.conns), w.asked, tc.conns)
				}
			})
		})
	}
}

// Pairs that begin together wait for one connection.
func TestPeersDialServerOnce(t *testing.T) {
	runPeers(t, func(w *peerWorld) {
		w.peer("b.example", "192.0.2.1")
		w.peer("c.example", "192.0.2.1")
		w.server("192.0.2.1", "b.example", "c.example")
	}, func(w *peerWorld) {
		w.after(time.Second)
		if len(w.conns) != 1 || len(w.asked) != 2 {
			t.Errorf("got %d connections, requests %q; want 1 and 2 requests", len(w.conns),
				w.asked)
		}
	})
}

// F10: after 421, the domain gets a connection of its own.
func TestPeerNotServed(t *testing.T) {
	runPeers(t, func(w *peerWorld) {
		w.peer("b.example", "192.0.2.1")
		w.peer("c.example", "192.0.2.2")
		w.server("192.0.2.1", "b.example", "c.example").statuses["c.example"] = 421
		w.server("192.0.2.2", "c.example")
		w.peers[1].Connect = false
	}, func(w *peerWorld) {
		w.after(time.Second)
		w.peers[1].Connect = true
		w.d.setPeers(w.peers, &Federation{})
		w.after(2 * time.Second)
		w.expect("A b.example 100ms", "A c.example 1s", "B c.example 1.1s")
		w.conns[1].carry["c.example"] <- errStreamReset
		w.after(4 * time.Second)
		w.expect("A b.example 100ms", "A c.example 1s", "B c.example 1.1s", "B c.example 3s")
	})
}

// F13: a revoked pair is asked for again after 1 s, 2 s and so on up to 5 min.
// Other pairs go on.
func TestPeerAsksAgain(t *testing.T) {
	for _, tc := range []struct {
		name   string
		status int
		state  PeerState
		reason string
	}{
		{"stream reset", 0, PeerWaiting, "stream 0 canceled by remote"},
		{"status 401", 401, PeerRefused, "the peer b.example does not accept our identity"},
		{"status 403", 403, PeerRefused, "the peer b.example does not link with a.example"},
		{"status 429", 429, PeerWaiting, "the peer b.example answers with status 429"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			runPeers(t, func(w *peerWorld) {
				w.peer("b.example", "192.0.2.1")
				w.peer("c.example", "192.0.2.1")
				w.server("192.0.2.1", "b.example", "c.example").statuses["b.example"] = tc.status
			}, func(w *peerWorld) {
				var times []time.Duration
				at := 100 * time.Millisecond
				for range 12 {
					w.after(at)
					times = append(times, at)
					if tc.status == 0 {
						w.conns[0].carry["b.example"] <- errStreamReset
						synctest.Wait()
					}
					s := w.state("b.example")
					if s.State != tc.state || !strings.HasPrefix(s.Reason, tc.reason) {
						t.Fatalf("got %+v, want %s: %s", s, tc.state, tc.reason)
					}
					at += time.Duration(s.RetryIn * float64(time.Second))
				}
				want := time.Second
				for i := range times[1:] {
					if got := times[i+1] - times[i]; got != want {
						t.Errorf("asked again after %v, want %v", got, want)
					}
					want = min(2*want, 5*time.Minute)
				}
				others := slices.DeleteFunc(slices.Clone(w.asked), func(s string) bool {
					return strings.Contains(s, "b.example")
				})
				if len(others) != 1 || len(w.conns) != 1 {
					t.Errorf("the other pair was disturbed: %q on %d connections", others,
						len(w.conns))
				}
			})
		})
	}
}

// F17 and K7: attempts to connect follow after 250 ms and so on up to 30 s, and
// resolve again at most every 10 s.
func TestPeerConnectsAgain(t *testing.T) {
	runPeers(t, func(w *peerWorld) {
		w.peer("b.example", "192.0.2.1")
		w.server("192.0.2.1", "b.example")
	}, func(w *peerWorld) {
		w.after(time.Second)
		w.servers[netip.MustParseAddr("192.0.2.1")].down = true
		w.conns[0].close()
		synctest.Wait()
		if len(w.d.conns) != 0 {
			t.Error("a connection that has ended stays in the table")
		}
		w.after(9 * time.Second)
		if w.resolutions != 1 {
			t.Errorf("resolved %d times within 10 s, want once", w.resolutions)
		}
		w.results["b.example"] = nil // DNS fails: the last result serves
		w.after(10 * time.Minute)
		if s := w.state("b.example"); s.State != PeerWaiting || s.RetryIn > 30 {
			t.Errorf("got %+v, want waiting for at most 30 s", s)
		}
		w.servers[netip.MustParseAddr("192.0.2.1")].down = false
		w.after(11 * time.Minute)
		if len(w.asked) != 2 {
			t.Errorf("got requests %q, want one after the server is back", w.asked)
		}
	})
}

// F17: a connection without pairs is closed after 60 s.
func TestPeerConnectionUnused(t *testing.T) {
	runPeers(t, func(w *peerWorld) {
		w.peer("b.example", "192.0.2.1")
		w.server("192.0.2.1", "b.example")
	}, func(w *peerWorld) {
		w.after(time.Second)
		w.d.setPeers(nil, &Federation{})
		w.after(60 * time.Second)
		if c := time.Duration(w.conns[0].closed.Load()); c != 0 {
			t.Errorf("closed after %v, want 1m1s", c)
		}
		w.after(62 * time.Second)
		if got, want := time.Duration(w.conns[0].closed.Load()), 61*time.Second; got != want || len(w.d.conns) != 0 {
			t.Errorf("closed after %v, want %v", got, want)
		}
	})
}

// F12: there is no need to dial while the peer carries the pair.
func TestPeerCarriedByPeer(t *testing.T) {
	k := pairKey{"b.example", "a.example"}
	runPeers(t, func(w *peerWorld) {
		w.peer("b.example", "192.0.2.1")
		w.server("192.0.2.1", "b.example")
		w.theirs[k] = true
	}, func(w *peerWorld) {
		w.after(time.Minute)
		w.expect()
		w.theirs[k] = false
		w.d.streamsChanged(k)
		w.after(61 * time.Second)
		w.expect("A b.example 1m0.1s")
	})
}

// The link of a peer that expires ends, and one that is changed begins anew.
func TestPeerChanges(t *testing.T) {
	runPeers(t, func(w *peerWorld) {
		w.peer("b.example", "192.0.2.1").Expires = time.Now().Add(time.Minute)
		w.server("192.0.2.1", "b.example")
	}, func(w *peerWorld) {
		w.after(time.Second)
		w.d.setPeers(w.peers, &Federation{}) // as before
		w.after(2 * time.Second)
		w.expect("A b.example 100ms")
		w.peers = slices.Clone(w.peers)
		w.peers[0].DNSSEC = false
		w.d.setPeers(w.peers, &Federation{})
		w.after(3 * time.Second)
		w.expect("A b.example 100ms", "A b.example 2s")
		w.after(2 * time.Minute)
		w.conns[0].carry["b.example"] <- errPeerExpired
		w.after(3 * time.Minute)
		w.expect("A b.example 100ms", "A b.example 2s")
		if s := w.state("b.example"); s.State != PeerExpired {
			t.Errorf("got %+v, want expired", s)
		}
	})
}
