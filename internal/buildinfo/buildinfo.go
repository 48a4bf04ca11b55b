// Package buildinfo describes the running program: its version, and the Go
// release and platform that it was built for.
package buildinfo

import (
	"runtime"
	"runtime/debug"
)

// Version is set with -ldflags "-X
// masquevpn/internal/buildinfo.Version=v1.2.3". If it is empty, the version of
// the main module counts.
var Version string

// Info describes a program.
type Info struct {
	Program string `json:"program"`
	Version string `json:"version"`
	Commit  string `json:"commit,omitempty"`
	Go      string `json:"go"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
}

// Of returns the Info of this process under the name program.
func Of(program string) Info {
	v := Info{Program: program, Version: Version, Go: runtime.Version(), OS: runtime.GOOS,
		Arch: runtime.GOARCH}
	if info, ok := debug.ReadBuildInfo(); ok {
		if v.Version == "" {
			v.Version = info.Main.Version
		}
		for _, s := range info.Settings {
			switch {
			case s.Key == "vcs.revision":
				v.Commit = s.Value
			case s.Key == "vcs.modified" && s.Value == "true":
				v.Commit += "+changes"
			}
		}
	}
	if v.Version == "" {
		v.Version = "(devel)"
	}
	return v
}
