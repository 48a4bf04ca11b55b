package config

import (
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// The reference of a configuration has exactly the keys that its parser reads,
// with the same defaults.
func TestReference(t *testing.T) {
	for _, tt := range []struct {
		name    string
		minimal string // a file with the required keys only
		more    string // tables that are comments in the reference
		parse   func(file string, data []byte) (any, *document, error)
	}{
		{"client.toml", `proxy = "vpn.example.org"`, "",
			func(file string, data []byte) (any, *document, error) {
				c, err := ParseClient(file, data)
				if err != nil {
					return nil, nil, err
				}
				return c, c.doc, nil
			}},
		{"proxy.toml", `name = "vpn.example.org"`,
			"\n[[site]]\nuser = \"branch\"\nnetworks = [\"192.0.2.0/24\"]\n" +
				"[[peer]]\ndomain = \"b.example\"\nnetworks = [\"203.0.113.0/24\"]\nreach = []\n",
			func(file string, data []byte) (any, *document, error) {
				p, err := ParseProxy(file, data)
				if err != nil {
					return nil, nil, err
				}
				p.MetricsNamed = false // set by the presence of the key
				return p, p.doc, nil
			}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			data, err := os.ReadFile("../../docs/reference/" + tt.name)
			if err != nil {
				t.Fatal(err)
			}
			got, _, err := tt.parse(tt.name, data)
			if err != nil {
				t.Fatal(err)
			}
			want, _, err := tt.parse(tt.name, []byte(tt.minimal))
			if err != nil {
				t.Fatal(err)
			}
			same := []cmp.Option{
				cmpopts.IgnoreUnexported(Client{}, Proxy{}), cmpopts.EquateEmpty(),
				cmp.Comparer(func(a, b netip.Prefix) bool {
					return a == b
				}), cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
			}
			if diff := cmp.Diff(want, got, same...); diff != "" {
				t.Errorf("the defaults differ (-parser +reference):\n%s", diff)
			}
			_, doc, err := tt.parse(tt.name, append(data, tt.more...))
			if err != nil {
				t.Fatal(err)
			}
			compareKeys(t, doc, data)
		})
	}
	t.Run("users.toml", func(t *testing.T) {
		data, err := os.ReadFile("../../docs/reference/users.toml")
		if err != nil {
			t.Fatal(err)
		}
		_, doc, err := parseUsers("users.toml", data)
		if err != nil {
			t.Fatal(err)
		}
		compareKeys(t, doc, data)
	})
}

var (
	index    = regexp.MustCompile(`\[\d+\]`)
	tableRow = regexp.MustCompile(`^#?\[\[?([a-z_.]+)\]\]?$`)
	keyRow   = regexp.MustCompile(`^#?([a-z0-9_]+) = `)
)

// compareKeys compares the keys that a parser read with the keys in the text of
// a reference. Keys without a default are behind a '#' there.
func compareKeys(t *testing.T, d *document, text []byte) {
	t.Helper()
	asked := make(map[string]bool)
	for _, table := range d.tables {
		for key := range table.asked {
			asked[join(index.ReplaceAllString(table.path, ""), key)] = true
		}
	}
	// Tables are read like keys.
	for _, table := range d.tables {
		delete(asked, index.ReplaceAllString(table.path, ""))
	}
	listed := make(map[string]bool)
	table := ""
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if m := tableRow.FindStringSubmatch(line); m != nil {
			table = m[1]
		} else if m := keyRow.FindStringSubmatch(line); m != nil {
			listed[join(table, m[1])] = true
		}
	}
	for key := range asked {
		if !listed[key] {
			t.Errorf("the key %s is missing: add it with its default, unit, meaning and reload behaviour", key)
		}
	}
	for key := range listed {
		if !asked[key] {
			t.Errorf("the parser does not know the key %s", key)
		}
	}
}
