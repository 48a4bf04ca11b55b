package routing

import (
	"encoding/json"
	"strings"
	"testing"
)

// A user who can write a journal cannot make a process with more privileges
// change anything but sysctls of the network.
func TestForeignSysctls(t *testing.T) {
	for name, valid := range map[string]bool{
		ipForward4: true, "net/ipv6/conf/eth0.1/accept_ra": true,
		"kernel/core_pattern": false, "net/../kernel/core_pattern": false,
		"../../etc/passwd": false, "/net/x": false, "net": false, "": false,
	} {
		t.Run(name, func(t *testing.T) {
			for _, c := range []sysctl{{Name: name},
				{Name: ipForward6, Also: []sysctl{{Name: name}}}} {
				b, err := json.Marshal(record{Format: journalFormat, Sysctls: []sysctl{c}})
				if err != nil {
					t.Fatal(err)
				}
				_, err = readRecord(strings.NewReader(string(b)))
				if valid != (err == nil) {
					t.Errorf("got error %v, want a valid journal: %t", err, valid)
				}
			}
		})
	}
}
