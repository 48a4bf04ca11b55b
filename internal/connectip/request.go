package connectip

import "strings"

// Protocol is the value of the :protocol pseudo-header (RFC 9484 section 4.2).
const Protocol = "connect-ip"

// Header fields of requests. Both are optional and specific to this project.
const (
	// InstanceHeader contains a random token that identifies one run of a
	// client program. By it the proxy distinguishes a client that reconnects,
	// perhaps before its old session timed out, from a second client of the
	// same user.
	InstanceHeader = "Masque-Instance"

	// InstallationHeader contains a token that survives restarts of the client
	// program. By it the proxy finds the addresses that the user last had on
	// this device.
	InstallationHeader = "Masque-Installation"
)

// maxToken is the maximum length of InstanceHeader and InstallationHeader in
// bytes. The proxy stores tokens for as long as it holds addresses for their
// previous owner.
const maxToken = 64

// IsToken reports whether s is a valid value of InstanceHeader and
// InstallationHeader: 1 to 64 letters, digits and characters of "-._~+/=".
func IsToken(s string) bool {
	if s == "" || len(s) > maxToken {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9',
			strings.IndexByte("-._~+/=", c) >= 0:
		default:
			return false
		}
	}
	return true
}
