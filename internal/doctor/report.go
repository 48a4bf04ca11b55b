// Package doctor checks a host and a configuration, and reports each problem
// with its remedy. Checks change nothing.
package doctor

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"masquevpn/internal/fault"
	"masquevpn/internal/text"
)

// The verdicts.
const (
	verdictOK   = "ok"
	verdictWarn = "warn"
	verdictFail = "fail"
)

// Finding is one line of a report.
type Finding struct {
	Verdict string `json:"verdict"` // ok, warn or fail
	Text    string `json:"what"`
	Remedy  string `json:"remedy,omitempty"`
}

// Report collects findings in order. The zero value is empty.
type Report struct {
	list []Finding
}

// OK adds the finding that something is as it should be.
func (c *Report) OK(format string, args ...any) {
	c.list = append(c.list, Finding{Verdict: verdictOK, Text: fmt.Sprintf(format, args...)})
}

// Warn adds the finding that something works and could be better.
func (c *Report) Warn(finding, remedy string) {
	c.list = append(c.list, Finding{Verdict: verdictWarn, Text: finding, Remedy: remedy})
}

// Fail adds the finding that something keeps the program from running.
func (c *Report) Fail(finding, remedy string) {
	c.list = append(c.list, Finding{Verdict: verdictFail, Text: finding, Remedy: remedy})
}

// Running adds the findings of a running program about its host: its warnings,
// and how often it repaired changes of other programs.
func (c *Report) Running(warnings []string, repairs map[string]uint64) {
	for _, w := range warnings {
		c.Fail("host: "+text.OneLine(w), "")
	}
	if list := text.Counts(repairs); list != "" {
		c.Warn("host: another program changed what the running program needs; repairs since the start: "+list, "look for that program: the log has the times")
	} else if len(warnings) == 0 {
		c.OK("host: the running program misses nothing in the kernel")
	}
}

// Finish writes the report, one line per finding, and returns a *fault.Error of
// kind Usage if a check failed.
func (c *Report) Finish(w io.Writer, asJSON bool) error {
	failed := 0
	for _, f := range c.list {
		if f.Verdict == verdictFail {
			failed++
		}
		line := fmt.Sprintf("%-4s  %s", f.Verdict, f.Text)
		if f.Remedy != "" {
			line += " — " + f.Remedy
		}
		if asJSON {
			encoded, err := json.Marshal(f)
			if err != nil {
				return err
			}
			line = string(encoded)
		}
		if _, err := fmt.Fprintln(w, text.OneLine(line)); err != nil {
			return err
		}
	}
	if failed > 0 {
		return fault.Errorf(fault.Usage,
			"%d of %d checks failed: follow the remedy behind each fail", failed, len(c.list))
	}
	return nil
}

// Config adds the outcome of loading a configuration, one finding for each
// problem. It reports whether there was none.
func (c *Report) Config(file string, err error) bool {
	if err == nil {
		c.OK("configuration: %s", file)
		return true
	}
	list, ok := errors.AsType[fault.List](err)
	if !ok {
		list = fault.List{fault.From(err)}
	}
	for _, e := range list {
		c.Fail("configuration: "+e.Summary(), e.Remedy)
	}
	return false
}
