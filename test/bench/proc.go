package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"masquevpn/internal/lab"
)

// clockTick is the unit of times in /proc/PID/stat on every Linux that Go runs on.
const clockTick = 10 * time.Millisecond

// cpu returns the processor time that both ends of the tunnel have used so far.
func (t *tunnel) cpu() (time.Duration, error) {
	var sum time.Duration
	for _, c := range []*lab.Cmd{t.client, t.proxy} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.PID()))
		if err != nil {
			return 0, fmt.Errorf("%s has ended: %w", c, err)
		}
		// The second field is the name in parentheses; utime and stime are the 14th and 15th.
		fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		for _, f := range fields[11:13] {
			n, err := strconv.ParseInt(f, 10, 64)
			if err != nil {
				return 0, fmt.Errorf("/proc/%d/stat: %w", c.PID(), err)
			}
			sum += time.Duration(n) * clockTick
		}
	}
	return sum, nil
}
