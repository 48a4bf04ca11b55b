package doctor

import (
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"

	"masquevpn/internal/qlog"
)

// LogFiles checks that the files under [log] can be written. An empty name
// stands for none.
func (c *Report) LogFiles(qlogDir, keyLog, pcap string) {
	if qlogDir != "" {
		if err := qlog.CheckDir(qlogDir); err != nil {
			c.Fail("log.qlog_dir: "+err.Error(),
				"name a folder that can be written to: mkdir -m 700 "+qlogDir)
		} else {
			c.Warn("log.qlog_dir: each connection is written to "+qlogDir+", which slows it",
				"remove it when it is not needed any more")
		}
	}
	for _, file := range []struct{ key, path, what string }{
		{"log.key_log", keyLog, "TLS secrets are"},
		{"log.pcap", pcap, "packets inside the tunnel are"},
	} {
		if file.path == "" {
			continue
		}
		dir := filepath.Dir(file.path)
		if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
			c.Fail(fmt.Sprintf("%s: %s: %v", file.key, dir, err), "name a file that can be written")
		} else {
			c.Warn(fmt.Sprintf("%s: %s written to %s", file.key, file.what, file.path),
				"remove it when it is not needed any more")
		}
	}
}
