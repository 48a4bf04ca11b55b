package routing

import (
	"encoding/json"
	"strings"
	"testing"
)

// TestForeignSysctls: whoever can write a journal cannot have a process with
// more rights change what is not the network's.
func TestForeignSysctls(t *testing.T) {
	for name, good := range map[string]bool{
		ipForward4: true, "net/ipv6/conf/eth0.1/accept_ra": true,
		"kernel/core_pattern": false, "net/../kernel/core_pattern": false,
		"../../etc/passwd": false, "/net/x": false, "net": false, "": false,
	} {
		for _, c := range []sysctl{{Name: name}, {Name: ipForward6, Also: []sysctl{{Name: name}}}} {
			b, err := json.Marshal(record{Format: journalFormat, Sysctls: []sysctl{c}})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := readRecord(strings.NewReader(string(b))); good != (err == nil) {
				t.Errorf("a journal with %q: %v", name, err)
			}
		}
	}
}
