package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode/utf8"
)

// step is an action of a scenario with its check.
type step struct {
	// name is printed before the step begins, as in "connect the client".
	name string
	do   func(context.Context) (result string, err error)
}

// stepTimeout limits every step. Steps take milliseconds. The programs' own
// time limits are shorter, and their messages better.
const stepTimeout = time.Minute

// stepResult is the result of a step for --json.
type stepResult struct {
	What       string  `json:"what"`
	OK         bool    `json:"ok"`
	Result     string  `json:"result,omitempty"`
	Error      string  `json:"error,omitempty"`
	DurationMS float64 `json:"duration_ms"`
}

// report runs steps and writes their results as text or JSON.
type report struct {
	out      io.Writer
	json     bool
	scenario scenario
	started  time.Time
	results  []stepResult
}

func newReport(out io.Writer, asJSON bool, s scenario) *report {
	return &report{out: out, json: asJSON, scenario: s, started: time.Now()}
}

// printf writes text unless the output is JSON.
func (r *report) printf(format string, args ...any) {
	if !r.json {
		fmt.Fprintf(r.out, format, args...)
	}
}

// begin prints the introduction of the scenario.
func (r *report) begin() {
	r.printf("%s: %s\n%s\n", r.scenario.name, r.scenario.about, r.scenario.intro)
}

// errInterrupted ends a step after SIGINT or SIGTERM.
var errInterrupted = errors.New("interrupted")

// nameWidth is the width of the column of step names, in characters.
const nameWidth = 52

// steps runs the steps until one fails.
func (r *report) steps(ctx context.Context, steps []step) error {
	for _, s := range steps {
		r.printf("%3d  %s%s ", len(r.results)+1, s.name,
			strings.Repeat(" ", max(0, nameWidth-utf8.RuneCountInString(s.name))))
		begin := time.Now()
		sctx, cancel := context.WithTimeout(ctx, stepTimeout)
		result, err := s.do(sctx)
		cancel()
		took := time.Since(begin)
		if ctx.Err() != nil {
			err = errInterrupted
		}
		done := stepResult{What: s.name, OK: err == nil, Result: result,
			DurationMS: float64(took.Microseconds()) / 1000}
		verdict := "ok"
		if err != nil {
			verdict, done.Error = "FAILED", err.Error()
		}
		r.results = append(r.results, done)
		r.printf("%-6s %8s", verdict, duration(took))
		r.printResult(result)
		if err != nil {
			return err
		}
	}
	return nil
}

// printResult completes a step's line with its result, or prints a result of
// several lines below it.
func (r *report) printResult(result string) {
	switch {
	case result == "":
		r.printf("\n")
	case strings.Contains(result, "\n"):
		r.printf("\n%s\n", indent(result))
	default:
		r.printf("  %s\n", result)
	}
}

// end prints the verdict. artifacts is the directory of the artifacts, if any.
// The ends of logs explain a failure.
func (r *report) end(artifacts string, logs []string, err error) error {
	if r.json {
		return r.endJSON(artifacts, logs, err)
	}
	if err != nil {
		if n := len(r.results); n > 0 && !r.results[n-1].OK {
			r.printf("\nStep %d failed: %s\n", n, r.results[n-1].What)
		} else {
			r.printf("\nEvery step held, but then this failed:\n")
		}
		r.printf("%s\n", indent(err.Error()))
		for _, name := range logs {
			if lines := tail(name, tailLines); len(lines) > 0 {
				r.printf("\nThe last lines of %s\n%s\n", name, indent(strings.Join(lines, "\n")))
			}
		}
	} else {
		r.printf("\nAll %d steps held, in %s.\n", len(r.results), duration(time.Since(r.started)))
	}
	if artifacts != "" {
		r.printf("\nThe programs' configuration and logs are kept in %s\n", artifacts)
	}
	return nil
}

// tailLines is the number of a log's last lines that explain a failure.
const tailLines = 12

func (r *report) endJSON(artifacts string, logs []string, err error) error {
	type logTail struct {
		File string   `json:"file"`
		Tail []string `json:"tail"`
	}
	v := struct {
		Schema     int          `json:"schema"`
		Scenario   string       `json:"scenario"`
		OK         bool         `json:"ok"`
		DurationMS float64      `json:"duration_ms"`
		Steps      []stepResult `json:"steps"`
		Error      string       `json:"error,omitempty"`
		Logs       []logTail    `json:"logs,omitempty"`
		Artifacts  string       `json:"artifacts,omitempty"`
	}{
		Schema: 1, Scenario: r.scenario.name, OK: err == nil,
		DurationMS: float64(time.Since(r.started).Microseconds()) / 1000, Steps: r.results,
		Artifacts: artifacts,
	}
	if err != nil {
		v.Error = err.Error()
		for _, name := range logs {
			if lines := tail(name, tailLines); len(lines) > 0 {
				v.Logs = append(v.Logs, logTail{name, lines})
			}
		}
	}
	e := json.NewEncoder(r.out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// failure returns one line about the failed step.
func (r *report) failure(err error) string {
	first, _, _ := strings.Cut(err.Error(), "\n")
	if n := len(r.results); n > 0 && !r.results[n-1].OK {
		return fmt.Sprintf("step %d, %s: %s", n, r.results[n-1].What, first)
	}
	return first
}

// tail returns the last n lines of a file, none when the file is empty or
// cannot be read.
func tail(name string, n int) []string {
	b, err := os.ReadFile(name)
	text := strings.TrimRight(string(b), "\n")
	if err != nil || text == "" {
		return nil
	}
	lines := strings.Split(text, "\n")
	return lines[max(0, len(lines)-n):]
}

func indent(text string) string {
	return "       " + strings.ReplaceAll(strings.TrimRight(text, "\n"), "\n", "\n       ")
}

// duration formats a duration with about three digits.
func duration(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return d.Round(10 * time.Microsecond).String()
	case d < time.Second:
		return d.Round(100 * time.Microsecond).String()
	}
	return d.Round(10 * time.Millisecond).String()
}
