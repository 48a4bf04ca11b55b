package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// value is the result of one measurement.
type value struct {
	what, unit string
	v          float64
}

func (v value) String() string { return fmt.Sprintf("%s %s %s", v.what, number(v.v), v.unit) }

// report collects the results. Its JSON form has all values.
type report struct {
	Machine  machine           `json:"machine"`
	Versions map[string]string `json:"versions"`
	Started  time.Time         `json:"started"`
	Rounds   int               `json:"rounds"`
	Results  []*result         `json:"results"`

	tunnels []string // names in the order of the columns
}

type machine struct {
	Cores  int    `json:"cores"`
	CPU    string `json:"cpu"`
	Kernel string `json:"kernel"`
	Go     string `json:"go"`
}

// result is one quantity measured in one case.
type result struct {
	Case string `json:"case"`
	What string `json:"what"`
	Unit string `json:"unit"`
	// Values lists results by round, keyed by tunnel; null for a failure.
	Values map[string][]*float64 `json:"values"`
}

func newReport(ctx context.Context, o options, tunnels []kind) *report {
	r := &report{Machine: thisMachine(), Versions: make(map[string]string), Started: time.Now(),
		Rounds: o.rounds}
	for _, t := range tunnels {
		r.tunnels = append(r.tunnels, t.name)
		switch {
		case t.ours:
			r.Versions[t.name] = describe(ctx, filepath.Join(t.bin, "masque-proxy"), "version")
		case t.name == wireguardName:
			r.Versions[t.name] = moduleVersion("golang.zx2c4.com/wireguard")
		default:
			r.Versions[t.name] = moduleVersion("github.com/quic-go/connect-ip-go") + ", quic-go " +
				moduleVersion("github.com/quic-go/quic-go")
		}
	}
	return r
}

// moduleVersion returns the version of a module in this program's go.mod, which
// wireguard-go is built from too.
func moduleVersion(path string) string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			if m.Path == path {
				return m.Version
			}
		}
	}
	return "unknown"
}

func thisMachine() machine {
	m := machine{Cores: runtime.NumCPU(), Go: runtime.Version(), CPU: "unknown"}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	info, _ := os.ReadFile("/proc/cpuinfo")
	for line := range bytes.Lines(info) {
		if name, value, ok := strings.Cut(string(line), ":"); ok &&
			strings.TrimSpace(name) == "model name" {
			m.CPU = strings.TrimSpace(value)
			break
		}
	}
	return m
}

// add records the results of a tunnel in a round. Rounds count from 0.
func (r *report) add(benchCase, tunnel string, round int, values []value) {
	for _, v := range values {
		i := slices.IndexFunc(r.Results, func(x *result) bool {
			return x.Case == benchCase && x.What == v.what
		})
		if i < 0 {
			i = len(r.Results)
			r.Results = append(r.Results,
				&result{Case: benchCase, What: v.what, Unit: v.unit,
					Values: make(map[string][]*float64)})
		}
		x := r.Results[i]
		if x.Values[tunnel] == nil {
			x.Values[tunnel] = make([]*float64, r.Rounds)
		}
		x.Values[tunnel][round] = &v.v
	}
}

// print writes a table with the median and the range of each tunnel, and the
// median of the rounds' ratios of the first tunnel to each other tunnel.
func (r *report) print(w io.Writer) {
	fmt.Fprintf(w, "\n%s; %d cores, %s, Linux %s, %s; %d rounds: median (lowest to highest)\n",
		r.Started.Format(time.DateTime),
		r.Machine.Cores, r.Machine.CPU, r.Machine.Kernel, r.Machine.Go, r.Rounds)
	for _, t := range r.tunnels {
		fmt.Fprintf(w, "%s: %s\n", t, r.Versions[t])
	}
	tw := tabwriter.NewWriter(w, 0, 0, 1, ' ', 0)
	defer tw.Flush()
	columns := slices.DeleteFunc(slices.Clone(r.tunnels), func(t string) bool {
		return !slices.ContainsFunc(r.Results, func(x *result) bool { return x.Values[t] != nil })
	})
	if len(columns) == 0 {
		return
	}
	row := func(cells []string) { fmt.Fprintf(tw, "| %s\t|\n", strings.Join(cells, "\t| ")) }
	heading := append([]string{"case", "what", "unit"}, columns...)
	for _, t := range columns[1:] {
		heading = append(heading, "ratio to "+t)
	}
	row(heading)
	row(strings.Split(strings.Repeat("---,", len(heading)-1)+"---", ","))
	for _, x := range r.Results {
		if !x.telling() {
			continue
		}
		cells := []string{x.Case, x.What, x.Unit}
		for _, t := range columns {
			cells = append(cells, spread(x.Values[t]))
		}
		for _, t := range columns[1:] {
			cells = append(cells, ratio(x.Values[columns[0]], x.Values[t]))
		}
		row(cells)
	}
}

// telling reports whether a result deserves a line. A place without losses does
// not.
func (x *result) telling() bool {
	for _, values := range x.Values {
		if slices.ContainsFunc(values, func(v *float64) bool { return v != nil && *v != 0 }) {
			return true
		}
	}
	return !strings.Contains(x.What, lostAt)
}

// telling returns the results that deserve a line.
func telling(values []value) []value {
	return slices.DeleteFunc(slices.Clone(values), func(v value) bool {
		return v.v == 0 && strings.Contains(v.what, lostAt)
	})
}

// lostAt marks the names of counters of losses at one place.
const lostAt = "lost: "

// spread formats the median, with the range in parentheses.
func spread(values []*float64) string {
	var have []float64
	for _, v := range values {
		if v != nil {
			have = append(have, *v)
		}
	}
	switch len(have) {
	case 0:
		return "-"
	case 1:
		return number(have[0])
	}
	return fmt.Sprintf("%s (%s to %s)", number(median(have)), number(slices.Min(have)),
		number(slices.Max(have)))
}

// ratio returns the median of a/b over the rounds.
func ratio(a, b []*float64) string {
	var ratios []float64
	for i := range min(len(a), len(b)) {
		if a[i] != nil && b[i] != nil && *b[i] != 0 {
			ratios = append(ratios, *a[i] / *b[i])
		}
	}
	if len(ratios) == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", median(ratios))
}

// median returns the median of values, which it sorts.
func median(values []float64) float64 {
	slices.Sort(values)
	n := len(values)
	return (values[(n-1)/2] + values[n/2]) / 2
}

// number formats v with three significant digits.
func number(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

func (r *report) save(file string) error {
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
}
