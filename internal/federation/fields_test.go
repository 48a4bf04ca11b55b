package federation

import (
	"net/http"
	"strings"
	"testing"
)

func TestParseFields(t *testing.T) {
	for _, tc := range []struct {
		name     string
		from, to []string
		want     Pair
		err      string
	}{
		{"a pair", []string{"a.example"}, []string{"b.example"},
			Pair{"a.example", "b.example"}, ""},
		{"upper case and final dot", []string{"A.Example."}, []string{"B.EXAMPLE"},
			Pair{"a.example", "b.example"}, ""},
		{"no to", []string{"a.example"}, nil, Pair{}, "Masque-To is there 0 times"},
		{"two from", []string{"a.example", "a.example"}, []string{"b.example"}, Pair{},
			"Masque-From is there 2 times"},
		{"a list", []string{"a.example, b.example"}, []string{"b.example"}, Pair{},
			"not a domain name"},
		{"a port", []string{"a.example:443"}, []string{"b.example"}, Pair{}, "not a domain name"},
		{"an address", []string{"192.0.2.1"}, []string{"b.example"}, Pair{}, "not a domain name"},
		{"empty", []string{""}, []string{"b.example"}, Pair{}, "not a domain name"},
		{"a line of a log", []string{"a\nlevel=ERROR"}, []string{"b.example"}, Pair{},
			`"a?level=ERROR" is not a domain name`},
		{"too long", []string{strings.Repeat("a", 500)}, []string{"b.example"}, Pair{},
			`"` + strings.Repeat("a", 253) + `" is not`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := http.Header{FromHeader: tc.from, ToHeader: tc.to}
			got, err := ParseFields(h)
			if got != tc.want || (err == nil) != (tc.err == "") ||
				err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Errorf("got %v, %v; want %v, %q", got, err, tc.want, tc.err)
			}
		})
	}
}

func TestSetFields(t *testing.T) {
	h := http.Header{}
	if IsPair(h) {
		t.Error("a request without fields asks for a pair")
	}
	p := Pair{"a.example", "b.example"}
	p.SetFields(h)
	if got, err := ParseFields(h); got != p || err != nil || !IsPair(h) {
		t.Errorf("got %v, %v; want %v", got, err, p)
	}
}

func FuzzParseFields(f *testing.F) {
	f.Add("a.example", "b.example")
	f.Add("A.example.", "xn--bcher-kva.example")
	f.Add("192.0.2.1", "[::1]:443")
	f.Fuzz(func(t *testing.T, from, to string) {
		p, err := ParseFields(http.Header{FromHeader: {from}, ToHeader: {to}})
		if err != nil {
			if len(err.Error()) > 2*maxField || strings.ContainsAny(err.Error(), "\n\r\x1b") {
				t.Errorf("the error %q is not one line", err)
			}
			return
		}
		again, err := ParseFields(http.Header{FromHeader: {p.From}, ToHeader: {p.To}})
		if err != nil || again != p {
			t.Errorf("%v becomes %v, %v", p, again, err)
		}
		if strings.ToLower(p.From) != p.From || strings.HasSuffix(p.To, ".") {
			t.Errorf("%v is not in the form of comparison", p)
		}
	})
}
