package dnsclient

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"masquevpn/internal/discovery"
)

// A message is an answer as far as it is used.
type message struct {
	code      dnsmessage.RCode
	truncated bool
	authentic bool // the AD bit
	final     bool // the server has no more to say: the name ends here (RFC 2308)
	malformed bool // the records end in the middle
	aliases   map[string]alias
	records   []record // in the answer's order
}

// An alias is a CNAME record.
type alias struct {
	target string
	ttl    time.Duration
}

// A record is one of the question's type.
type record struct {
	owner string
	ttl   time.Duration
	data  any // netip.Addr, discovery.SRV or discovery.HTTPS
}

// parse parses a message and reports whether it answers q under the given
// identifier. Records that cannot be parsed are left out, so that one of them
// does not spoil the others.
func parse(msg []byte, id uint16, q dnsmessage.Question) (*message, bool) {
	var p dnsmessage.Parser
	h, err := p.Start(msg)
	if err != nil || !h.Response || h.ID != id {
		return nil, false
	}
	m := &message{code: h.RCode, truncated: h.Truncated, authentic: h.AuthenticData,
		final: h.RCode == dnsmessage.RCodeNameError, aliases: make(map[string]alias)}
	asked, err := p.Question()
	if err != nil && h.RCode != dnsmessage.RCodeSuccess && h.RCode != dnsmessage.RCodeNameError {
		return m, true // some servers do not repeat the question in errors
	}
	if err != nil || asked.Type != q.Type || asked.Class != q.Class ||
		lower(asked.Name) != lower(q.Name) || p.SkipAllQuestions() != nil {
		return nil, false
	}
	if !m.truncated {
		m.readAnswers(&p, q.Type)
	}
	return m, true
}

// readAnswers reads the records of a type and the CNAMEs, and looks for the SOA
// record that says that there are no more.
func (m *message) readAnswers(p *dnsmessage.Parser, t dnsmessage.Type) {
	for range maxRecords {
		h, err := p.AnswerHeader()
		if err == dnsmessage.ErrSectionDone {
			m.readAuthorities(p)
			return
		}
		if err != nil {
			m.malformed = true
			return
		}
		if h.Class == dnsmessage.ClassINET && m.readRecord(p, h, t) {
			continue
		}
		if err := p.SkipAnswer(); err != nil {
			m.malformed = true
			return
		}
	}
}

// readRecord reads a CNAME or a record of type t, and reports whether it did.
func (m *message) readRecord(p *dnsmessage.Parser, h dnsmessage.ResourceHeader,
	t dnsmessage.Type) bool {
	ttl := time.Duration(h.TTL) * time.Second
	if h.TTL > 1<<31-1 {
		ttl = 0 // RFC 2181 section 8
	}
	owner := lower(h.Name)
	if h.Type == dnsmessage.TypeCNAME {
		r, err := p.CNAMEResource()
		if err == nil {
			m.aliases[owner] = alias{lower(r.CNAME), ttl}
		}
		return err == nil
	}
	if h.Type != t {
		return false
	}
	data, err := readData(p, h)
	if err == nil {
		m.records = append(m.records, record{owner, ttl, data})
	}
	return err == nil
}

// readData reads the data of a record. The parser does not compare the length
// of addresses.
func readData(p *dnsmessage.Parser, h dnsmessage.ResourceHeader) (any, error) {
	switch h.Type {
	case dnsmessage.TypeA:
		if h.Length != net.IPv4len {
			return nil, errMalformed
		}
		r, err := p.AResource()
		return netip.AddrFrom4(r.A), err
	case dnsmessage.TypeAAAA:
		if h.Length != net.IPv6len {
			return nil, errMalformed
		}
		r, err := p.AAAAResource()
		return netip.AddrFrom16(r.AAAA), err
	case dnsmessage.TypeSRV:
		r, err := p.SRVResource()
		return discovery.SRV{Priority: r.Priority, Weight: r.Weight, Port: r.Port,
			Target: r.Target.String()}, err
	case dnsmessage.TypeHTTPS:
		r, err := p.HTTPSResource()
		if err != nil {
			return nil, err
		}
		return https(r)
	}
	return nil, errMalformed
}

// https returns an HTTPS record, or an error if one of its parameters is
// malformed (RFC 9460 section 2.2).
func https(r dnsmessage.HTTPSResource) (h discovery.HTTPS, err error) {
	h = discovery.HTTPS{Priority: r.Priority, Target: r.Target.String()}
	for _, p := range r.Params {
		v := p.Value
		switch p.Key {
		case dnsmessage.SVCParamMandatory:
			if len(v) == 0 || len(v)%2 != 0 {
				return h, errMalformed
			}
			for ; len(v) > 0; v = v[2:] {
				h.Mandatory = append(h.Mandatory, binary.BigEndian.Uint16(v))
			}
		case dnsmessage.SVCParamALPN:
			for len(v) > 0 {
				n := int(v[0])
				if n == 0 || n >= len(v) {
					return h, errMalformed
				}
				h.ALPN, v = append(h.ALPN, string(v[1:1+n])), v[1+n:]
			}
		case dnsmessage.SVCParamPort:
			if len(v) != 2 {
				return h, errMalformed
			}
			h.Port, h.HasPort = binary.BigEndian.Uint16(v), true
		}
	}
	return h, nil
}

// readAuthorities looks for an SOA record, with which a server says that a name
// has no records of the type, in contrast to an alias that it did not follow.
func (m *message) readAuthorities(p *dnsmessage.Parser) {
	for range maxRecords {
		h, err := p.AuthorityHeader()
		if err != nil {
			return
		}
		m.final = m.final || h.Type == dnsmessage.TypeSOA
		if p.SkipAuthority() != nil {
			return
		}
	}
}

// lower returns a name in lower case, without the final dot.
func lower(n dnsmessage.Name) string {
	return strings.ToLower(strings.TrimSuffix(n.String(), "."))
}

// A chain leads from the name that was asked for along its aliases to records.
type chain struct {
	t      dnsmessage.Type
	first  string
	seen   map[string]bool
	answer discovery.Answer
}

// maxTTL is the TTL of an answer without records: it limits nothing.
const maxTTL = 1<<31 - 1

func newChain(name string, t dnsmessage.Type) *chain {
	return &chain{t: t, first: name, seen: map[string]bool{name: true},
		answer: discovery.Answer{TTL: maxTTL * time.Second, Secure: true}}
}

// name returns the last name of c.
func (c *chain) name() string {
	if n := len(c.answer.Aliases); n > 0 {
		return c.answer.Aliases[n-1]
	}
	return c.first
}

// add goes on along the aliases of m and takes its records. It reports whether
// they complete c.
func (c *chain) add(m *message, trusted bool) (complete bool, err error) {
	c.answer.Secure = c.answer.Secure && trusted && m.authentic
	for {
		a, ok := m.aliases[c.name()]
		if !ok {
			break
		}
		if c.seen[a.target] || len(c.answer.Aliases) == maxAliases {
			return false, fmt.Errorf("LOOP: %w", discovery.ErrAliases)
		}
		c.seen[a.target] = true
		c.answer.Aliases = append(c.answer.Aliases, a.target)
		c.answer.TTL = min(c.answer.TTL, a.ttl)
	}
	found := false
	for _, r := range m.records {
		if r.owner != c.name() {
			continue
		}
		found = true
		c.answer.TTL = min(c.answer.TTL, r.ttl)
		switch data := r.data.(type) {
		case netip.Addr:
			c.answer.Addrs = append(c.answer.Addrs, data)
		case discovery.SRV:
			c.answer.SRV = append(c.answer.SRV, data)
		case discovery.HTTPS:
			c.answer.HTTPS = append(c.answer.HTTPS, data)
		}
	}
	return found || m.final || len(m.aliases) == 0, nil
}
