package config

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"

	"masquevpn/internal/fault"
)

// document is a TOML file with the line of every key. Its tables return typed
// values and record the requested keys: keys in the file that were never
// requested are unknown, and refused.
type document struct {
	file string
	// lines holds line numbers keyed by path, as in "user[1].addresses[0]".
	lines map[string]int
	// values holds scalars and arrays keyed by path, for messages.
	values   map[string]any
	secret   map[string]bool
	tables   []*table
	problems fault.List
}

// byteOrderMarks lists the byte order marks of some editors, which TOML
// forbids, with remedies.
var byteOrderMarks = map[string]string{
	"\xef\xbb\xbf": "save the file as UTF-8 without one",
	"\xff\xfe":     "save the file as UTF-8, not UTF-16",
	"\xfe\xff":     "save the file as UTF-8, not UTF-16",
}

// parse reads data as TOML. The error, if any, is a fault.List.
func parse(file string, data []byte) (*document, *table, error) {
	d := &document{file: file, lines: make(map[string]int), values: make(map[string]any),
		secret: make(map[string]bool)}
	root := make(map[string]any)
	for mark, remedy := range byteOrderMarks {
		if strings.HasPrefix(string(data[:min(len(data), len(mark))]), mark) {
			return nil, nil, fault.List{{Kind: fault.Usage, File: file, Line: 1,
				Reason: "starts with a byte order mark", Remedy: remedy}}
		}
	}
	if err := toml.Unmarshal(data, &root); err != nil {
		p := &fault.Error{Kind: fault.Usage, File: file,
			Reason: strings.TrimPrefix(err.Error(), "toml: ")}
		if de, ok := errors.AsType[*toml.DecodeError](err); ok {
			p.Line, _ = de.Position()
			p.Key = strings.Join(de.Key(), ".")
		}
		return nil, nil, fault.List{p}
	}
	d.index(data)
	return d, d.newTable("", root), nil
}

// index fills d.lines. The data must be valid TOML.
func (d *document) index(data []byte) {
	var p unstable.Parser
	p.Reset(data)
	line := func(n *unstable.Node) int {
		if n.Raw.Length == 0 {
			return 0
		}
		return p.Shape(n.Raw).Start.Line
	}
	// elements counts the elements of each array of tables seen so far.
	elements := make(map[string]int)
	// pathOf returns the path of a dotted key below base. It uses the latest
	// element of each array of tables on the path.
	pathOf := func(base string, key unstable.Iterator) (path string, first int) {
		path = base
		for key.Next() {
			if n := elements[path]; n > 0 {
				path += "[" + strconv.Itoa(n-1) + "]"
			}
			path = join(path, string(key.Node().Data))
			if l := line(key.Node()); first == 0 {
				first = l
			}
			if _, ok := d.lines[path]; !ok {
				d.lines[path] = first
			}
		}
		return path, first
	}
	var keyValue func(base string, n *unstable.Node)
	var value func(path string, at int, n *unstable.Node)
	keyValue = func(base string, n *unstable.Node) {
		path, at := pathOf(base, n.Key())
		d.lines[path] = at
		value(path, at, n.Value())
	}
	value = func(path string, at int, n *unstable.Node) {
		switch n.Kind {
		case unstable.InlineTable:
			for it := n.Children(); it.Next(); {
				keyValue(path, it.Node())
			}
		case unstable.Array:
			i := 0
			for it := n.Children(); it.Next(); i++ {
				element := path + "[" + strconv.Itoa(i) + "]"
				d.lines[element] = cmp.Or(line(it.Node()), at)
				value(element, d.lines[element], it.Node())
			}
		}
	}
	base := ""
	for p.NextExpression() {
		switch n := p.Expression(); n.Kind {
		case unstable.Table:
			path, at := pathOf("", n.Key())
			if n := elements[path]; n > 0 {
				path += "[" + strconv.Itoa(n-1) + "]"
			}
			d.lines[path] = at
			base = path
		case unstable.ArrayTable:
			path, at := pathOf("", n.Key())
			elements[path]++
			base = path + "[" + strconv.Itoa(elements[path]-1) + "]"
			d.lines[base] = at
		case unstable.KeyValue:
			keyValue(base, n)
		}
	}
}

// problem returns an error about the key at path. It quotes the key's value in
// the document unless it is secret.
func (d *document) problem(path, reason, remedy string) *fault.Error {
	p := &fault.Error{Kind: fault.Usage, File: d.file, Line: d.lines[path], Key: path,
		Reason: reason, Remedy: remedy}
	for parent := path; p.Line == 0 && parent != ""; {
		parent = parentOf(parent)
		p.Line = d.lines[parent]
	}
	if v, ok := d.values[path]; ok && !d.secret[path] {
		p.Value = quote(v)
	}
	return p
}

// locate adds file, line and value to an error about a key that was found after
// parsing. It returns other errors as they are.
func (d *document) locate(err error) error {
	e, ok := errors.AsType[*fault.Error](err)
	if !ok || e.Kind != fault.Usage || e.Key == "" || e.File != "" {
		return err
	}
	located := d.problem(e.Key, e.Reason, e.Remedy)
	located.Err = e.Err
	return located
}

// add records a problem of the key at path.
func (d *document) add(path, reason, remedy string) {
	d.problems = append(d.problems, d.problem(path, reason, remedy))
}

// finish reports all problems, unknown keys included, as a fault.List.
func (d *document) finish() error {
	for _, t := range d.tables {
		for _, key := range slices.Sorted(maps.Keys(t.values)) {
			if _, ok := t.asked[key]; !ok {
				path := join(t.path, key)
				delete(d.values, path) // the value of a misspelt key may be secret
				d.add(path, "unknown key", d.suggest(t, key))
			}
		}
	}
	if len(d.problems) == 0 {
		return nil
	}
	slices.SortStableFunc(d.problems, func(a, b *fault.Error) int {
		return cmp.Compare(a.Line, b.Line)
	})
	return d.problems
}

// suggest returns a known key that resembles an unknown key of t.
func (d *document) suggest(t *table, key string) string {
	for _, other := range d.tables {
		if _, ok := other.asked[key]; ok && other != t {
			if other.path == "" {
				return "it belongs at the top of the file, before the first table"
			}
			return fmt.Sprintf("it belongs to [%s]", other.path)
		}
	}
	best, distance := "", 3
	for _, known := range slices.Sorted(maps.Keys(t.asked)) {
		if n := editDistance(key, known); n < distance && n < len(known) {
			best, distance = known, n
		}
	}
	if best != "" {
		return fmt.Sprintf("did you mean %q?", join(t.path, best))
	}
	return "remove it"
}

// table is one table of a document.
type table struct {
	doc    *document
	path   string
	values map[string]any
	asked  map[string]struct{}
}

func (d *document) newTable(path string, values map[string]any) *table {
	t := &table{doc: d, path: path, values: values, asked: make(map[string]struct{})}
	for key, v := range values {
		d.values[join(path, key)] = v
		if list, ok := v.([]any); ok {
			for i, e := range list {
				d.values[element(join(path, key), i)] = e
			}
		}
	}
	d.tables = append(d.tables, t)
	return t
}

// get returns the value of a key and marks the key as known.
func (t *table) get(key string) (any, bool) {
	t.asked[key] = struct{}{}
	v, ok := t.values[key]
	return v, ok
}

// has reports whether the file sets the key. It does not mark the key as known.
func (t *table) has(key string) bool {
	_, ok := t.values[key]
	return ok
}

func (t *table) add(key, reason, remedy string) {
	t.doc.add(join(t.path, key), reason, remedy)
}

// table returns the table at key, empty if the file has none.
func (t *table) table(key string) *table {
	v, ok := t.get(key)
	values, isTable := v.(map[string]any)
	if ok && !isTable {
		delete(t.doc.values, join(t.path, key))
		t.add(key, "is a table, not a value",
			fmt.Sprintf("write [%s] on a line of its own", join(t.path, key)))
	}
	return t.doc.newTable(join(t.path, key), values)
}

// tablesOf returns the elements of the array of tables at key.
func (t *table) tablesOf(key string) []*table {
	v, ok := t.get(key)
	if !ok {
		return nil
	}
	list, ok := v.([]any)
	var tables []*table
	for i, e := range list {
		values, isTable := e.(map[string]any)
		ok = ok && isTable
		tables = append(tables, t.doc.newTable(element(join(t.path, key), i), values))
	}
	if !ok {
		delete(t.doc.values, join(t.path, key))
		t.add(key, "is a list of tables",
			fmt.Sprintf("start each with [[%s]] on a line of its own", join(t.path, key)))
		return nil
	}
	return tables
}

// scalar returns the value of key as a T. It returns def when the key is
// absent, or, with a problem, when the value has another type.
func scalar[T any](t *table, key string, def T, want string) T {
	v, ok := t.get(key)
	if !ok {
		return def
	}
	s, ok := v.(T)
	if !ok {
		t.add(key, "not "+want, "write "+want)
		return def
	}
	return s
}

func (t *table) string(key, def string) string {
	return scalar(t, key, def, "a string in quotes")
}

// stringOrInt returns a string, also for a number without quotes.
func (t *table) stringOrInt(key, def string) string {
	if n, ok := t.values[key].(int64); ok {
		t.asked[key] = struct{}{}
		return strconv.FormatInt(n, 10)
	}
	return t.string(key, def)
}

func (t *table) bool(key string, def bool) bool {
	return scalar(t, key, def, "true or false")
}

// secretString returns a string that messages never quote.
func (t *table) secretString(key string) string {
	t.doc.secret[join(t.path, key)] = true
	return t.string(key, "")
}

// file returns a file name, joined with the directory of the document if
// relative.
func (t *table) file(key, def string) string {
	name := t.string(key, def)
	if name == "" || filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(filepath.Dir(t.doc.file), name)
}

// int returns a number from low to high.
func (t *table) int(key string, def, low, high int) int {
	want := fmt.Sprintf("a number from %d to %d", low, high)
	n := scalar(t, key, int64(def), want)
	if t.has(key) && (n < int64(low) || n > int64(high)) {
		t.add(key, "out of range", "write "+want)
		return def
	}
	return int(n)
}

// oneOf returns a string out of a fixed set. The first is the default.
func (t *table) oneOf(key string, words ...string) string {
	s := t.string(key, words[0])
	if !slices.Contains(words, s) {
		t.add(key, "not known", "write "+alternatives(words))
		return words[0]
	}
	return s
}

// strings returns a list of strings.
func (t *table) strings(key string, def []string) []string {
	v, ok := t.get(key)
	if !ok {
		return def
	}
	list, ok := v.([]any)
	if !ok {
		t.add(key, "not a list", `write a list of strings: ["...", "..."]`)
		return def
	}
	words := make([]string, len(list))
	bad := false
	for i, e := range list {
		if words[i], ok = e.(string); !ok {
			t.add(element(key, i), "not a string in quotes", "put it in quotes")
			bad = true
		}
	}
	if bad {
		return def
	}
	return words
}

// either refuses two keys that exclude each other.
func (t *table) either(a, aValue, b, bValue string) {
	if aValue != "" && bValue != "" {
		t.add(a, fmt.Sprintf("%s says the same", join(t.path, b)), "keep one of the two")
	}
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

func element(path string, i int) string {
	return path + "[" + strconv.Itoa(i) + "]"
}

func parentOf(path string) string {
	return path[:max(strings.LastIndexAny(path, ".["), 0)]
}

// quote formats a value as TOML, shortened for a message.
func quote(v any) string {
	const limit = 80
	var s string
	switch v := v.(type) {
	case string:
		s = strconv.Quote(v)
	case []any:
		words := make([]string, len(v))
		for i, e := range v {
			words[i] = quote(e)
		}
		s = "[" + strings.Join(words, ", ") + "]"
	case map[string]any:
		return ""
	default:
		s = fmt.Sprint(v)
	}
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit], "") + "..."
	}
	return s
}

func alternatives(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = strconv.Quote(w)
	}
	return strings.Join(quoted, " or ")
}

// editDistance returns the Levenshtein distance of two short words.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}
