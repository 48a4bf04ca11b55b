// Package text formats numbers and foreign text for people.
package text

import (
	"fmt"
	"slices"
	"strings"
)

// OneLine returns s on one line and without control characters. Text from a
// peer or a file goes through it on the way to a terminal.
func OneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || '\u0080' <= r && r < '\u00a0' {
			return ' '
		}
		return r
	}, strings.TrimSpace(s))
}

// Size formats a number of bytes with a binary prefix, as in "1.5 KiB".
func Size(n uint64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n)/1024, 0
	for value >= 1024 {
		value /= 1024
		unit++
	}
	return fmt.Sprintf("%.1f %ciB", value, units[unit])
}

// Counts lists the counters that are not zero, as in "3 no route, 12 too big".
func Counts(counts map[string]uint64) string {
	var words []string
	for name, n := range counts {
		if n > 0 {
			words = append(words, fmt.Sprintf("%d %s", n, strings.ReplaceAll(name, "_", " ")))
		}
	}
	slices.SortFunc(words, func(a, b string) int {
		_, a, _ = strings.Cut(a, " ")
		_, b, _ = strings.Cut(b, " ")
		return strings.Compare(a, b)
	})
	return strings.Join(words, ", ")
}
