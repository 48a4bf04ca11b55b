package dnsclient

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"masquevpn/internal/discovery"
	"masquevpn/internal/discovery/discoverytest"
)

// client returns a client of servers, which are trusted.
func client(servers ...netip.AddrPort) *Client {
	return &Client{Servers: func() []Server {
		var list []Server
		for _, s := range servers {
			list = append(list, Server{s, true})
		}
		return list
	}}
}

func addrs(list ...string) (a []netip.Addr) {
	for _, s := range list {
		a = append(a, netip.MustParseAddr(s))
	}
	return a
}

func TestLookup(t *testing.T) {
	ttl := 60
	w := &discoverytest.World{DNS: map[string]discoverytest.Node{
		"a.example":     {A: addrs("192.0.2.1", "192.0.2.2"), AAAA: addrs("2001:db8::1")},
		"alias.example": {CNAME: "a.example.", TTL: &ttl},
		"srv.example":   {SRV: []string{"10 20 443 A.example.", "0 0 0 ."}},
		"https.example": {HTTPS: []string{"1 . alpn=h3,h2 port=8443 mandatory=alpn,key999",
			"0 a.example."}},
		"large.example": {A: addrs("192.0.2.1"), Fail: map[string]string{"A": "TRUNCATED"}},
		"loop.example":  {CNAME: "loop.example."},
		"bad.example":   {Fail: map[string]string{"A": "SERVFAIL"}},
	}, Signed: []string{"a.example", "alias.example"}}
	for i := range 10 {
		w.DNS["c"+string(rune('0'+i))+".example"] = discoverytest.Node{CNAME: "c" +
			string(rune('1'+i)) + ".example."}
	}
	c := client(w.ServeDNS(t))
	const long = maxTTL * time.Second
	for _, tt := range []struct {
		name string
		t    discovery.Type
		want discovery.Answer
		err  string
	}{
		{"a.example", discovery.TypeA, discovery.Answer{Addrs: addrs("192.0.2.1", "192.0.2.2"),
			TTL: 300 * time.Second, Secure: true}, ""},
		{"a.example", discovery.TypeAAAA, discovery.Answer{Addrs: addrs("2001:db8::1"),
			TTL: 300 * time.Second, Secure: true}, ""},
		{"alias.example", discovery.TypeAAAA, discovery.Answer{Addrs: addrs("2001:db8::1"),
			Aliases: []string{"a.example"}, TTL: 60 * time.Second, Secure: true}, ""},
		{"alias.example", discovery.TypeSRV, discovery.Answer{Aliases: []string{"a.example"},
			TTL: 60 * time.Second, Secure: true}, ""},
		{"srv.example", discovery.TypeSRV, discovery.Answer{SRV: []discovery.SRV{
			{Priority: 10, Weight: 20, Port: 443, Target: "A.example."}, {Target: "."}},
			TTL: 300 * time.Second}, ""},
		{"https.example", discovery.TypeHTTPS, discovery.Answer{HTTPS: []discovery.HTTPS{
			{Priority: 1, Target: ".", ALPN: []string{"h3", "h2"}, Port: 8443, HasPort: true,
				Mandatory: []uint16{1, 999}}, {Target: "a.example."}}, TTL: 300 * time.Second}, ""},
		{"none.example", discovery.TypeA, discovery.Answer{TTL: long}, ""},
		{"large.example", discovery.TypeA, discovery.Answer{Addrs: addrs("192.0.2.1"),
			TTL: 300 * time.Second}, ""},
		{strings.Repeat("a.", 127) + "example", discovery.TypeA,
			discovery.Answer{TTL: long, Secure: true}, ""},
		{"loop.example", discovery.TypeA, discovery.Answer{}, "LOOP: circular aliases"},
		{"c0.example", discovery.TypeA, discovery.Answer{}, "LOOP: circular aliases"},
		{"bad.example", discovery.TypeA, discovery.Answer{}, "SERVFAIL"},
	} {
		t.Run(tt.name+" "+tt.t.String(), func(t *testing.T) {
			got, err := c.Lookup(t.Context(), tt.name, tt.t)
			if tt.err != "" {
				if err == nil || err.Error() != tt.err {
					t.Errorf("got the error %v, want %s", err, tt.err)
				}
				return
			}
			if err != nil || !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got %+v, %v, want %+v", got, err, tt.want)
			}
		})
	}
}

// TestSecureNeedsTrust checks that the AD bit of a server that is not trusted
// counts for nothing.
func TestSecureNeedsTrust(t *testing.T) {
	w := &discoverytest.World{DNS: map[string]discoverytest.Node{"a.example": {A: addrs("192.0.2.1")}},
		Signed: []string{"a.example"}}
	server := w.ServeDNS(t)
	for _, trusted := range []bool{true, false} {
		c := &Client{Servers: func() []Server { return []Server{{server, trusted}} }}
		if a, err := c.Lookup(t.Context(), "a.example", discovery.TypeA); err != nil ||
			a.Secure != trusted {
			t.Errorf("got %+v, %v, want Secure %v", a, err, trusted)
		}
	}
}

// serve answers queries by UDP with the messages that reply returns, until the
// test ends.
func serve(t *testing.T, reply func(query *dnsmessage.Message) [][]byte) netip.AddrPort {
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:n]) != nil {
				continue
			}
			for _, msg := range reply(&m) {
				_, _ = c.WriteToUDPAddrPort(msg, from)
			}
		}
	}()
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// answerTo returns an answer to a query with the given records.
func answerTo(query *dnsmessage.Message, answers ...dnsmessage.Resource) *dnsmessage.Message {
	return &dnsmessage.Message{Header: dnsmessage.Header{ID: query.ID, Response: true},
		Questions: query.Questions, Answers: answers}
}

func packed(t *testing.T, m *dnsmessage.Message) []byte {
	msg, err := m.Pack()
	if err != nil {
		t.Error(err)
	}
	return msg
}

func a(owner, addr string) dnsmessage.Resource {
	return dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(owner),
		Class: dnsmessage.ClassINET, TTL: 300},
		Body: &dnsmessage.AResource{A: netip.MustParseAddr(addr).As4()}}
}

func cname(owner, target string) dnsmessage.Resource {
	return dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(owner),
		Class: dnsmessage.ClassINET, TTL: 300},
		Body: &dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName(target)}}
}

// TestQuery checks the query: it asks for the AD bit and not for signatures.
func TestQuery(t *testing.T) {
	queries := make(chan dnsmessage.Message, 1)
	server := serve(t, func(q *dnsmessage.Message) [][]byte {
		queries <- *q
		return [][]byte{packed(t, answerTo(q, a("a.example.", "192.0.2.1")))}
	})
	if _, err := client(server).Lookup(t.Context(), "a.example", discovery.TypeA); err != nil {
		t.Fatal(err)
	}
	q := <-queries
	if !q.RecursionDesired || !q.AuthenticData || q.CheckingDisabled || q.Response {
		t.Errorf("got the header %+v, want RD and AD", q.Header)
	}
	if len(q.Additionals) != 1 || q.Additionals[0].Header.Class != udpSize ||
		q.Additionals[0].Header.DNSSECAllowed() {
		t.Errorf("got the additional records %+v, want EDNS with %d bytes and without DO",
			q.Additionals, udpSize)
	}
}

// TestForeignAnswers checks that answers to other questions are not taken.
func TestForeignAnswers(t *testing.T) {
	server := serve(t, func(q *dnsmessage.Message) [][]byte {
		right := answerTo(q, a("a.example.", "192.0.2.1"))
		otherID, otherName, otherType := answerTo(q, a("a.example.", "192.0.2.66")),
			answerTo(q, a("a.example.", "192.0.2.66")), answerTo(q, a("a.example.", "192.0.2.66"))
		otherID.ID++
		otherName.Questions = []dnsmessage.Question{{Name: dnsmessage.MustNewName("b.example."),
			Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}
		otherType.Questions = []dnsmessage.Question{{Name: dnsmessage.MustNewName("a.example."),
			Type: dnsmessage.TypeAAAA, Class: dnsmessage.ClassINET}}
		isQuery := answerTo(q, a("a.example.", "192.0.2.66"))
		isQuery.Response = false
		return [][]byte{{1, 2, 3}, packed(t, otherID), packed(t, otherName), packed(t, otherType),
			packed(t, isQuery), packed(t, right)}
	})
	got, err := client(server).Lookup(t.Context(), "a.example", discovery.TypeA)
	if err != nil || !slices.Equal(got.Addrs, addrs("192.0.2.1")) {
		t.Errorf("got %+v, %v, want the right answer", got, err)
	}
}

// TestRecordsOfOthers checks that records of names that are not asked for are
// left out.
func TestRecordsOfOthers(t *testing.T) {
	server := serve(t, func(q *dnsmessage.Message) [][]byte {
		return [][]byte{packed(t, answerTo(q, a("b.example.", "192.0.2.66"),
			cname("A.example.", "C.example."),
			cname("d.example.", "e.example."), a("c.EXAMPLE.", "192.0.2.1"),
			a("a.example.", "192.0.2.66")))}
	})
	got, err := client(server).Lookup(t.Context(), "a.example", discovery.TypeA)
	if err != nil || !slices.Equal(got.Addrs, addrs("192.0.2.1")) ||
		!slices.Equal(got.Aliases, []string{"c.example"}) {
		t.Errorf("got %+v, %v, want the records at the end of the alias", got, err)
	}
}

// TestUnfollowedAlias checks that an alias which a server leaves to its client
// is followed, and that all of the answer has to be signed.
func TestUnfollowedAlias(t *testing.T) {
	server := serve(t, func(q *dnsmessage.Message) [][]byte {
		m := answerTo(q, cname("a.example.", "b.example."))
		m.AuthenticData = true
		if q.Questions[0].Name.String() == "b.example." {
			m = answerTo(q, a("b.example.", "192.0.2.1"))
		}
		return [][]byte{packed(t, m)}
	})
	got, err := client(server).Lookup(t.Context(), "a.example", discovery.TypeA)
	if err != nil || !slices.Equal(got.Addrs, addrs("192.0.2.1")) || got.Secure {
		t.Errorf("got %+v, %v, want the address, not secure", got, err)
	}
}

// TestBadRecord checks that a malformed record does not spoil the others.
func TestBadRecord(t *testing.T) {
	server := serve(t, func(q *dnsmessage.Message) [][]byte {
		msg := packed(t, answerTo(q, a("a.example.", "192.0.2.1"),
			dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName("a.example."),
				Class: dnsmessage.ClassINET},
				Body: &dnsmessage.UnknownResource{Type: dnsmessage.TypeA,
					Data: []byte{1, 2}}},
			a("a.example.", "192.0.2.3")))
		return [][]byte{msg}
	})
	got, err := client(server).Lookup(t.Context(), "a.example", discovery.TypeA)
	if err != nil || !slices.Equal(got.Addrs, addrs("192.0.2.1", "192.0.2.3")) {
		t.Errorf("got %+v, %v, want the other records", got, err)
	}
}

// TestNextServer checks which failures lead to the next server.
func TestNextServer(t *testing.T) {
	good := serve(t, func(q *dnsmessage.Message) [][]byte {
		return [][]byte{packed(t, answerTo(q, a("a.example.", "192.0.2.1")))}
	})
	var asked atomic.Int32
	failing := func(code dnsmessage.RCode) netip.AddrPort {
		return serve(t, func(q *dnsmessage.Message) [][]byte {
			asked.Add(1)
			m := answerTo(q)
			m.RCode = code
			return [][]byte{packed(t, m)}
		})
	}
	for _, tt := range []struct {
		name   string
		server netip.AddrPort
	}{
		{"SERVFAIL", failing(dnsmessage.RCodeServerFailure)},
		{"REFUSED", failing(dnsmessage.RCodeRefused)},
		{"nobody listens", netip.MustParseAddrPort("127.0.0.1:1")},
		{"silence", serve(t, func(*dnsmessage.Message) [][]byte { return nil })},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := client(tt.server, good).Lookup(t.Context(), "a.example", discovery.TypeA)
			if err != nil || !slices.Equal(got.Addrs, addrs("192.0.2.1")) {
				t.Errorf("got %+v, %v, want the answer of the other server", got, err)
			}
		})
	}
	asked.Store(0)
	if _, err := client(failing(dnsmessage.RCodeServerFailure)).Lookup(t.Context(), "a.example",
		discovery.TypeA); err == nil || asked.Load() != 1 {
		t.Errorf("a single server is asked %d times, want once: %v", asked.Load(), err)
	}
	if _, err := client().Lookup(t.Context(), "a.example", discovery.TypeA); !errors.Is(err,
		errNoServer) {
		t.Errorf("without servers: got %v, want %v", err, errNoServer)
	}
}

// TestNoEDNS checks that a server without EDNS is asked again without it.
func TestNoEDNS(t *testing.T) {
	server := serve(t, func(q *dnsmessage.Message) [][]byte {
		m := answerTo(q, a("a.example.", "192.0.2.1"))
		if len(q.Additionals) > 0 {
			m = &dnsmessage.Message{Header: dnsmessage.Header{ID: q.ID, Response: true,
				RCode: dnsmessage.RCodeFormatError}}
		}
		return [][]byte{packed(t, m)}
	})
	got, err := client(server).Lookup(t.Context(), "a.example", discovery.TypeA)
	if err != nil || !slices.Equal(got.Addrs, addrs("192.0.2.1")) {
		t.Errorf("got %+v, %v, want the answer without EDNS", got, err)
	}
}

// TestManyRecords checks that no more than the limit is read.
func TestManyRecords(t *testing.T) {
	q := dnsmessage.Question{Name: dnsmessage.MustNewName("a.example."), Type: dnsmessage.TypeA,
		Class: dnsmessage.ClassINET}
	query := &dnsmessage.Message{Header: dnsmessage.Header{ID: 7},
		Questions: []dnsmessage.Question{q}}
	var records []dnsmessage.Resource
	for range 1000 {
		records = append(records, a("a.example.", "192.0.2.1"))
	}
	m, ok := parse(packed(t, answerTo(query, records...)), 7, q)
	if !ok || len(m.records) != maxRecords {
		t.Errorf("got %d records, want %d", len(m.records), maxRecords)
	}
}

func TestParseConfig(t *testing.T) {
	got := parseConfig([]byte(`# comment
; another
nameserver 127.0.0.53   # stub
nameserver fe80::1%eth0
nameserver bad
options edns0 trust-ad
search example.org
`))
	want := HostConfig{Servers: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.53:53"),
		netip.MustParseAddrPort("[fe80::1%eth0]:53")}, TrustAD: true}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got := ReadConfig(filepath.Join(t.TempDir(), "none")); len(got.Servers) != 1 ||
		got.TrustAD ||
		got.Servers[0].String() != "127.0.0.1:53" {
		t.Errorf("without a file: got %+v, want the server on this host", got)
	}
}

func TestHostsFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hosts")
	h := &HostsFile{Path: path}
	if got := h.Lookup("a.example"); got != nil {
		t.Errorf("without a file: got %v", got)
	}
	write := func(s string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("192.0.2.1 A.example. b.example # c.example\n2001:db8::1\ta.example\nbad a.example\n192.0.2.2\n")
	for name, want := range map[string][]netip.Addr{"a.example": addrs("192.0.2.1", "2001:db8::1"),
		"b.example": addrs("192.0.2.1"), "c.example": nil} {
		if got := h.Lookup(name); !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", name, got, want)
		}
	}
	write("192.0.2.99 a.example\n")
	if got := h.Lookup("a.example"); !slices.Equal(got, addrs("192.0.2.99")) {
		t.Errorf("after a change: got %v", got)
	}
}

func FuzzParse(f *testing.F) {
	q := dnsmessage.Question{Name: dnsmessage.MustNewName("a.example."), Type: dnsmessage.TypeHTTPS,
		Class: dnsmessage.ClassINET}
	w := &discoverytest.World{DNS: map[string]discoverytest.Node{"a.example": {
		HTTPS: []string{"1 . alpn=h3 port=8443 mandatory=alpn", "0 b.example."},
		A:     addrs("192.0.2.1"),
		SRV:   []string{"0 0 443 b.example."}}}}
	for _, t := range []dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeSRV,
		dnsmessage.TypeHTTPS} {
		q.Type = t
		query, err := pack(7, q, true)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(w.Reply(query), uint16(t))
	}
	f.Fuzz(func(t *testing.T, msg []byte, kind uint16) {
		q.Type = dnsmessage.Type(kind)
		m, ok := parse(msg, 7, q)
		if !ok {
			return
		}
		c := newChain("a.example", q.Type)
		_, _ = c.add(m, true)
		if len(c.answer.Aliases) > maxAliases || len(m.records) > maxRecords {
			t.Errorf("got %d aliases and %d records", len(c.answer.Aliases), len(m.records))
		}
	})
}
