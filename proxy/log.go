package proxy

import (
	"strings"

	"masquevpn/internal/connectip"
)

// maxReason is the length in bytes of the longest reason in the log. Reasons
// quote input of clients.
const maxReason = 500

// shorten returns the text of err for the log, at most maxReason bytes and an
// ellipsis. It returns "" for nil.
func shorten(err error) string {
	if err == nil {
		return ""
	}
	s := connectip.Explain(err)
	if len(s) > maxReason {
		s = strings.ToValidUTF8(s[:maxReason], "") + "..."
	}
	return s
}
