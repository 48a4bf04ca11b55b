// Bench compares tunnels: masquevpn, wireguard-go, and connect-ip-go with
// water, each between hosts in network namespaces of its own. Every case runs
// with one tunnel after the other, in rounds, so that changes on the machine
// affect all of them.
//
// `make bench` builds and runs it. docs/performance.md explains the
// measurements.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"masquevpn/internal/lab"
)

// options are the flags of the command line.
type options struct {
	bins   binaries
	cases  *regexp.Regexp
	peers  *regexp.Regexp
	rounds int
	// time is the duration of one measurement. 0: the case's own.
	time  time.Duration
	json  string
	quick bool
	list  bool
}

// binaries are the directories of masquevpn's programs, one for each build to
// compare.
type binaries []string

func (b *binaries) String() string { return strings.Join(*b, " ") }

func (b *binaries) Set(dir string) error {
	*b = append(*b, dir)
	return nil
}

func main() {
	if len(os.Args) > 1 {
		if program := programs[os.Args[1]]; program != nil {
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			if err := program(ctx, os.Args[2:]); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			return
		}
	}
	var o options
	flag.Var(&o.bins, "bin", "`directory` of our programs; given again, a further build of ours to compare (default bin)")
	cases := flag.String("case", "", "only the cases that match this `regexp`")
	peers := flag.String("peer", "", "only the tunnels that match this `regexp`")
	flag.IntVar(&o.rounds, "rounds", 0, "how often each case runs (default 5, or 2 with -quick)")
	flag.DurationVar(&o.time, "time", 0,
		"how long each measurement takes; default: what its case wants")
	flag.StringVar(&o.json, "json", "", "`file` for the results, with every single value")
	flag.BoolVar(&o.quick, "quick", false, "a subset that takes less than three minutes")
	flag.BoolVar(&o.list, "list", false, "list the cases and do nothing")
	flag.Parse()

	var err, err2 error
	o.cases, err = regexp.Compile(*cases)
	o.peers, err2 = regexp.Compile(*peers)
	if flag.NArg() > 0 {
		err = fmt.Errorf("unexpected argument %q", flag.Arg(0))
	}
	if err := errors.Join(err, err2); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	if o.list {
		for _, c := range allCases {
			fmt.Printf("%-26s %s\n", c.name, c.about)
		}
		return
	}
	if len(o.bins) == 0 {
		o.bins = binaries{"bin"}
	}
	if o.rounds == 0 {
		o.rounds = 5
		if o.quick {
			o.rounds = 2
		}
	}
	lab.Enter()
	os.Exit(run(o))
}

// quickTime is the maximum duration of one measurement with -quick.
const quickTime = 2 * time.Second

// programs are required in the hosts besides the tunnels' own programs.
var programs = map[string]func(context.Context, []string) error{
	"plain-proxy":  plainProxy,
	"plain-client": plainClient,
	"sessions":     sessions,
}

func run(o options) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir, err := os.MkdirTemp("", "masquevpn-bench-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	defer os.RemoveAll(dir)
	r, err := newRunner(ctx, o, dir)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	err = r.all(ctx)
	r.report.print(os.Stdout)
	if o.json != "" {
		err = errors.Join(err, r.report.save(o.json))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

// runner runs cases with each tunnel in turn.
type runner struct {
	options
	tunnels []kind
	dir     string // directory for configurations, visible in hosts
	report  *report
}

func newRunner(ctx context.Context, o options, dir string) (*runner, error) {
	if err := lab.CheckTUN(); err != nil {
		return nil, err
	}
	r := &runner{options: o, dir: dir}
	for i, dir := range o.bins {
		abs, err := filepath.Abs(dir)
		if err != nil {
			return nil, err
		}
		o.bins[i] = abs
	}
	all := kinds(o.bins)
	r.report = newReport(ctx, o, all)
	for _, k := range all {
		if o.peers.MatchString(k.name) {
			r.tunnels = append(r.tunnels, k)
		}
	}
	if len(r.tunnels) == 0 {
		return nil, fmt.Errorf("no tunnel matches %q", o.peers)
	}
	return r, nil
}

// all runs the selected cases. A failed case does not stop the others.
func (r *runner) all(ctx context.Context) error {
	var errs []error
	found := false
	for _, c := range allCases {
		if !r.cases.MatchString(c.name) || r.quick && !c.quick {
			continue
		}
		found = true
		if err := r.one(ctx, c); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", c.name, err))
			fmt.Fprintln(os.Stderr, errs[len(errs)-1])
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	if !found {
		return fmt.Errorf("no case matches %q", r.cases)
	}
	return errors.Join(errs...)
}

// one runs one case: it sets up all tunnels and measures them in turn.
func (r *runner) one(ctx context.Context, c benchCase) (err error) {
	d := c.time
	if r.quick {
		d = min(d, quickTime)
	}
	if r.time > 0 {
		d = r.time
	}
	var up []*tunnel
	var errs []error
	defer func() {
		for _, t := range up {
			err = errors.Join(err, t.Lab.Close())
		}
	}()
	for _, k := range r.tunnels {
		if c.oursOnly && !k.ours {
			continue
		}
		t, err := k.open(ctx, r.dir, c.path)
		if err != nil {
			return fmt.Errorf("%s: %w", k.name, err)
		}
		up = append(up, t)
		if c.bare {
			continue
		}
		if err := t.start(ctx); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", k.name, err))
			up = up[:len(up)-1] // the other tunnels go on
			errs = append(errs, t.Lab.Close())
		}
	}
	for round := range r.rounds {
		for i := range up {
			t := up[(i+round)%len(up)] // the order rotates
			values, err := c.run(ctx, t, d)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("%s, round %d: %w", t.name, round+1, err))
			}
			fmt.Fprintf(os.Stderr, "%s %s %d/%d: %v\n", c.name, t.name, round+1, r.rounds,
				telling(values))
			r.report.add(c.name, t.name, round, values)
		}
	}
	return errors.Join(errs...)
}
