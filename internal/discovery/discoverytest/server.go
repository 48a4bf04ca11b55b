package discoverytest

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

// ServeDNS answers questions about w at an address of this host, by UDP and
// TCP, until the test ends. Like a recursive resolver it follows aliases, and
// like a validating one it sets the AD bit. A failure "TIMEOUT" is no answer,
// "TRUNCATED" is an answer that is complete by TCP alone, any other is
// SERVFAIL.
func (w *World) ServeDNS(t testing.TB) netip.AddrPort {
	t.Helper()
	udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", udp.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = udp.Close(), tcp.Close() })
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := udp.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			if msg := w.Reply(buf[:n]); msg != nil {
				_, _ = udp.WriteToUDPAddrPort(msg, from)
			}
		}
	}()
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			go w.serveStream(c)
		}
	}()
	return udp.LocalAddr().(*net.UDPAddr).AddrPort()
}

// serveStream answers one question on a connection.
func (w *World) serveStream(c net.Conn) {
	defer c.Close()
	var length [2]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return
	}
	query := make([]byte, binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(c, query); err != nil {
		return
	}
	if msg := w.reply(query, true); msg != nil {
		_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(msg))), msg...))
	}
}

// Reply returns the answer to a query by UDP, nil for none.
func (w *World) Reply(query []byte) []byte { return w.reply(query, false) }

// reply returns the answer to a query, nil for none.
func (w *World) reply(query []byte, stream bool) []byte {
	var p dnsmessage.Parser
	h, err := p.Start(query)
	if err != nil {
		return nil
	}
	q, err := p.Question()
	if err != nil {
		return nil
	}
	h.Response, h.AuthenticData = true, false
	m := dnsmessage.Message{Header: h, Questions: []dnsmessage.Question{q}}
	name := strings.ToLower(strings.TrimSuffix(q.Name.String(), "."))
	kind := strings.TrimPrefix(q.Type.String(), "Type")
	secure := true
	var seen []string
	for {
		n, signed := w.node(name)
		secure = secure && signed
		switch f := n.failure(kind); {
		case f == "TIMEOUT":
			return nil
		case f == "TRUNCATED" && !stream:
			m.Truncated = true
			return pack(&m)
		case f != "" && f != "TRUNCATED":
			m.RCode, m.Answers = dnsmessage.RCodeServerFailure, nil
			return pack(&m)
		}
		seen = append(seen, name)
		if n.CNAME == "" {
			m.Answers = append(m.Answers, n.resources(name, kind)...)
			break
		}
		m.Answers = append(m.Answers,
			n.resource(name, &dnsmessage.CNAMEResource{CNAME: dnsName(n.CNAME)}))
		name = strings.ToLower(strings.TrimSuffix(n.CNAME, "."))
		if slices.Contains(seen, name) {
			break
		}
	}
	m.AuthenticData = secure
	m.Authorities = []dnsmessage.Resource{{Header: header(name, 300), Body: &dnsmessage.SOAResource{
		NS: dnsName("ns.example."), MBox: dnsName("root.example.")}}}
	return pack(&m)
}

func (n Node) failure(kind string) string {
	if f := n.Fail[kind]; f != "" {
		return f
	}
	return n.Fail["*"]
}

func pack(m *dnsmessage.Message) []byte {
	msg, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return msg
}

func dnsName(s string) dnsmessage.Name {
	return dnsmessage.MustNewName(strings.TrimSuffix(s, ".") + ".")
}

func header(owner string, ttl int) dnsmessage.ResourceHeader {
	return dnsmessage.ResourceHeader{Name: dnsName(owner), Class: dnsmessage.ClassINET,
		TTL: uint32(ttl)}
}

func (n Node) resource(owner string, body dnsmessage.ResourceBody) dnsmessage.Resource {
	ttl := 300
	if n.TTL != nil {
		ttl = *n.TTL
	}
	return dnsmessage.Resource{Header: header(owner, ttl), Body: body}
}

// resources returns the records of a type.
func (n Node) resources(owner, kind string) []dnsmessage.Resource {
	var list []dnsmessage.Resource
	add := func(b dnsmessage.ResourceBody) { list = append(list, n.resource(owner, b)) }
	switch kind {
	case "A":
		for _, a := range n.A {
			add(&dnsmessage.AResource{A: a.As4()})
		}
	case "AAAA":
		for _, a := range n.AAAA {
			add(&dnsmessage.AAAAResource{AAAA: a.As16()})
		}
	case "SRV":
		for _, s := range n.SRV {
			r, err := parseSRV(s)
			if err != nil {
				panic(err)
			}
			add(&dnsmessage.SRVResource{Priority: r.Priority, Weight: r.Weight, Port: r.Port,
				Target: dnsName(r.Target)})
		}
	case "HTTPS":
		for _, s := range n.HTTPS {
			add(httpsResource(s))
		}
	}
	return list
}

// httpsResource returns an HTTPS record in its wire format.
func httpsResource(s string) *dnsmessage.HTTPSResource {
	h := parseHTTPS(s)
	r := dnsmessage.SVCBResource{Priority: h.Priority, Target: dnsName(h.Target)}
	var mandatory, alpn []byte
	for _, k := range h.Mandatory {
		mandatory = binary.BigEndian.AppendUint16(mandatory, k)
		if k > uint16(dnsmessage.SVCParamIPv6Hint) {
			r.SetParam(dnsmessage.SVCParamKey(k), []byte{1})
		}
	}
	for _, id := range h.ALPN {
		alpn = append(append(alpn, byte(len(id))), id...)
	}
	if mandatory != nil {
		r.SetParam(dnsmessage.SVCParamMandatory, mandatory)
	}
	if alpn != nil {
		r.SetParam(dnsmessage.SVCParamALPN, alpn)
	}
	if h.HasPort {
		r.SetParam(dnsmessage.SVCParamPort, binary.BigEndian.AppendUint16(nil, h.Port))
	}
	return &dnsmessage.HTTPSResource{SVCBResource: r}
}
