// Package harness drives the real programs for the demo, the end-to-end tests
// and the measurements: it starts `conclaved dev`, speaks to it as any site and
// role, runs the conclave command, and kills, freezes and restarts nodes.
//
// Nothing in it reaches into a node: what it knows it has from the API, the
// files of the development cluster (DESIGN.md, section 11) and the process
// table. It waits for conditions with deadlines and never for time to pass.
package harness
